"""A server that speaks the part of vLLM's HTTP API that the trainer uses, over a tiny model with real LoRA adapters.

Its answers, refusals among them, are those that vLLM 0.32.0 on a CPU gave to the same requests.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, TopPLogitsWarper


class FakeVLLM:
    """Serves ``base`` under the adapters that are loaded into it, at :attr:`url`, until :meth:`close`.

    Args:
        alter: changes the answer to ``/v1/completions`` before it is sent.

    ``generation_config`` is the checkpoint's, with ``--override-generation-config``: what vLLM takes a request's
    ``top_k`` and ``presence_penalty`` from where it names none, and further tokens to stop at. The other attributes are
    how the server was started: ``--max-lora-rank``, None without ``--enable-lora``;
    ``VLLM_ALLOW_RUNTIME_LORA_UPDATING``; ``--logprobs-mode``; ``--max-model-len``; ``VLLM_USE_RUST_FRONTEND``, whose
    refusals are those of 0.33.0.
    """

    def __init__(self, base: str, alter: Callable[[dict[str, Any]], Any] = lambda answer: answer) -> None:
        self.base, self.alter = base, alter
        self.generation_config: dict[str, Any] = {}
        self.max_lora_rank: int | None = 16
        self.runtime_updating, self.processed_logprobs, self.max_model_len = True, True, 128
        self.rust_frontend = False
        self.models: dict[str, Any] = {}
        self.requests: list[tuple[str, Any]] = []
        self.lock = Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self.handler())
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def handler(self) -> type[BaseHTTPRequestHandler]:
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                cards = [{"id": fake.base, "max_model_len": fake.max_model_len}]
                cards += [{"id": name, "max_model_len": None} for name in fake.models]
                self.answer(200, {"object": "list", "data": cards})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with fake.lock:
                    fake.requests.append((self.path, body))
                    self.answer(*fake.act(self.path, body))

            def answer(self, status: int, content: Any) -> None:
                data = (content if isinstance(content, str) else json.dumps(content)).encode()
                self.send_response(status)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        return Handler

    def act(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path.endswith("lora_adapter") and not self.runtime_updating:
            return 404, {"detail": "Not Found"}
        if path == "/v1/load_lora_adapter":
            return self.load(body["lora_name"], body["lora_path"])
        if path == "/v1/unload_lora_adapter":
            if self.rust_frontend and body["lora_name"] in list(self.models)[:-1]:  # which the newest drove out
                return refused(500, f"engine rejected removal of LoRA adapter `{body['lora_name']}` with id 1")
            if self.models.pop(body["lora_name"], None) is None:
                return refused(404, f"The lora adapter '{body['lora_name']}' cannot be found.")
            return 200, f"Success: LoRA adapter '{body['lora_name']}' removed successfully."
        if body["model"] not in (self.base, *self.models):
            return refused(404, f"The model `{body['model']}` does not exist. Valid aliases: {self.base}.")
        if len(body["prompt"]) >= self.max_model_len or body["max_tokens"] > self.max_model_len:
            return refused(400, f"... cannot be greater than max_model_len={self.max_model_len} ...")
        return 200, self.alter(self.complete(body))

    def load(self, name: str, path: str) -> tuple[int, Any]:
        failed = "Call to add_lora method failed: Worker failed with error '{}', please check the stack trace above"
        if name in self.models:
            return refused(400, f"The lora adapter '{name}' has already been loaded. If you want to ...")
        if self.rust_frontend and self.max_lora_rank is None:
            return refused(400, "engine was not started with LoRA enabled")
        if self.rust_frontend and not Path(path).exists():
            return refused(400, "Local LoRA adapter path must exist and be accessible.")
        if self.max_lora_rank is None:
            return refused(500, failed.format("LoRA is not enabled. Use --enable-lora to enable LoRA."))
        if not (config := Path(path, "adapter_config.json")).exists():
            return refused(404, f"Loading lora {name} failed: No adapter found for {path}")
        if (rank := json.loads(config.read_bytes())["r"]) > self.max_lora_rank:
            return refused(500, failed.format(f"LoRA rank {rank} is greater than max_lora_rank {self.max_lora_rank}."))
        with torch.random.fork_rng(devices=[]):
            self.models[name] = PeftModel.from_pretrained(self.base_model(), path).eval()
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    def base_model(self) -> Any:
        with torch.random.fork_rng(devices=[]):  # a server of its own would not draw from the trainer's generator
            return AutoModelForCausalLM.from_pretrained(self.base).eval()

    @torch.no_grad()
    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """One completion, cut where the context is full, and with what was asked for beside its text."""
        model = self.models.get(body["model"]) or self.base_model()
        generator = torch.Generator().manual_seed(body["seed"])
        ids, logprobs, reason = list(body["prompt"]), [], "length"
        given = {"top_k": 0, "presence_penalty": 0.0, **self.generation_config, **body}
        own_stops = [] if body.get("ignore_eos") else self.generation_config.get("eos_token_id", [])
        while len(ids) < min(len(body["prompt"]) + body["max_tokens"], self.max_model_len):
            raw = model(input_ids=torch.tensor([ids])).logits[0, -1:].float()
            logits = raw.clone()
            logits[:, ids[len(body["prompt"]) :]] -= given["presence_penalty"]
            logits = logits / body["temperature"]
            if given["top_k"] > 0:
                logits = logits.masked_fill(logits < logits.topk(given["top_k"]).values[..., -1:], -torch.inf)
            logits = TopPLogitsWarper(float(body["top_p"]))(torch.tensor([ids]), logits)
            token = int(torch.multinomial(logits.softmax(-1), 1, generator=generator))
            logprobs.append((logits if self.processed_logprobs else raw).log_softmax(-1)[0, token].item())
            ids.append(token)
            if token in (*body.get("stop_token_ids", ()), *own_stops):
                reason = "stop"
                break
        tokens = ids[len(body["prompt"]) :] if body.get("return_token_ids") else None
        asked = {"token_logprobs": logprobs} if "logprobs" in body else None
        return {"choices": [{"index": 0, "text": "", "finish_reason": reason, "token_ids": tokens, "logprobs": asked}]}


def refused(status: int, message: str) -> tuple[int, Any]:
    return status, {"error": {"message": message, "param": None, "code": status}}
