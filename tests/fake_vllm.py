"""A server that speaks the part of vLLM's HTTP API that the trainer uses, over a tiny model with real LoRA adapters."""

from __future__ import annotations

import json
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


class FakeVLLM:
    """Serves ``base`` under the adapters that are loaded into it, at :attr:`url`, until :meth:`close`.

    Args:
        alter: changes the answer to ``/v1/completions`` before it is sent.

    ``generation_config`` is the checkpoint's: what vLLM takes a request's ``top_k`` from where it names none, and
    further tokens to stop at.
    """

    def __init__(self, base: str, alter: Callable[[dict[str, Any]], Any] = lambda answer: answer) -> None:
        self.base, self.alter = base, alter
        self.generation_config: dict[str, Any] = {}
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
                self.answer(200, {"data": [{"id": name} for name in (fake.base, *fake.models)]})

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
        if path == "/v1/load_lora_adapter":
            if body["lora_name"] in self.models:
                return 400, {"error": {"message": f"The lora adapter '{body['lora_name']}' has already been loaded."}}
            with torch.random.fork_rng(devices=[]):  # a server of its own would not draw from the trainer's generator
                base = AutoModelForCausalLM.from_pretrained(self.base)
                self.models[body["lora_name"]] = PeftModel.from_pretrained(base, body["lora_path"]).eval()
            return 200, f"Success: LoRA adapter '{body['lora_name']}' added successfully."
        if path == "/v1/unload_lora_adapter":
            del self.models[body["lora_name"]]
            return 200, f"Success: LoRA adapter '{body['lora_name']}' removed successfully."
        if body["model"] not in self.models:
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
        return 200, self.alter(self.complete(body))

    @torch.no_grad()
    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        model, generator = self.models[body["model"]], torch.Generator().manual_seed(body["seed"])
        ids, logprobs, reason = list(body["prompt"]), [], "length"
        top_k = {"top_k": 0, **self.generation_config, **body}["top_k"]
        own_stops = [] if body.get("ignore_eos") else self.generation_config.get("eos_token_id", [])
        while len(ids) < len(body["prompt"]) + body["max_tokens"]:
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1].float() / body["temperature"]
            if top_k > 0:
                logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
            token = int(torch.multinomial(logits.softmax(-1), 1, generator=generator))
            logprobs.append(logits.log_softmax(-1)[token].item())
            ids.append(token)
            if token in (*body["stop_token_ids"], *own_stops):
                reason = "stop"
                break
        choice = {"token_ids": ids[len(body["prompt"]) :], "finish_reason": reason, "text": ""}
        return {"choices": [choice | {"logprobs": {"token_logprobs": logprobs}}]}
