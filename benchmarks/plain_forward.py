"""The limit that the agent is measured against: `transformers` in float32, the same texts and batches, mean over tokens, nothing else.

    python -m benchmarks.plain_forward MODEL ROWS MAX_TOKENS BATCH

Prints JSON; the clocks run from the end of the first batch to the end of the last.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

began = time.monotonic()


def main(model: str, rows: str, max_tokens: int, batch: int) -> None:
    import torch
    from transformers import AutoModel, PreTrainedTokenizerFast

    from edge_agent.health import peak_rss_bytes

    torch.set_num_threads(1)
    with torch.inference_mode():
        network = AutoModel.from_pretrained(model, dtype=torch.float32).eval()
        padding = "[PAD]" if network.config.model_type == "bert" else "<pad>"
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(Path(model) / "tokenizer.json"), pad_token=padding)
        texts = [json.loads(line)["text"] for line in Path(rows).read_text(encoding="utf-8").splitlines()]
        marks = [(time.monotonic(), time.process_time())]
        for at in range(0, len(texts), batch):
            inputs = tokenizer(texts[at : at + batch], padding=True, truncation=True, max_length=max_tokens, return_tensors="pt")
            mask = inputs["attention_mask"].unsqueeze(-1)
            states = network(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
            ((states * mask).sum(dim=1) / mask.sum(dim=1)).numpy()
            marks.append((time.monotonic(), time.process_time()))
    samples = len(texts) - batch
    print(json.dumps({
        "seconds_per_sample": (marks[-1][0] - marks[1][0]) / samples, "cpu_seconds_per_sample": (marks[-1][1] - marks[1][1]) / samples,
        "peak_rss_bytes": peak_rss_bytes(), "ready_seconds": marks[0][0] - began, "first_frame_seconds": marks[1][0] - began,
    }))  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
