"""The kernels and the self-reward inside other people's trainers, a file each.

    hf        Hugging Face ``Trainer``: cross-entropy without logits, one line around the model
    trl       GRPOTrainer, RLOOTrainer, SFTTrainer: log-probs and cross-entropy without logits; the self-reward
    verl      policy losses by name, and a reward manager
    openrlhf  the self-reward as an agent (``--train.agent_func_path``) or a function (``--reward.remote_url``)

Nothing here is imported by ``import srppo``; each file needs its own package only when it is used.
"""
