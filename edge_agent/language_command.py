"""`edge-agent generate`, and `edge-agent infer --file` where the checkpoint is a language model's: bits per byte of its rows."""

from __future__ import annotations

import json
import math

import typer

from edge_agent import exit_codes
from edge_agent.backbone import TextError
from edge_agent.generation import Sampling
from edge_agent.health import peak_rss_bytes
from edge_agent.infer_command import Refusals, checkpoint_trouble_told, of_each, rows_of
from edge_agent.language_model import TextLoss, open_generator, open_language_model
from edge_agent.language_rows import BETWEEN
from edge_agent.sample_files import FileSource
from edge_agent.settings import AgentSettings
from side_tuning.tasks import METRICS
from side_tuning.token_bytes import bits_per_byte


def generate(settings: AgentSettings, prompt: str, sampling: Sampling, most: int, *, respond: bool, backbone_only: bool) -> None:
    """Print the continuation of `prompt` as it comes; with `respond` the answer to it, as in prompt-response pairs."""
    with checkpoint_trouble_told():
        generator = open_generator(
            settings.backbone.folder, settings.state_directory, threads=settings.backbone.threads, backbone_only=backbone_only
        )
    try:
        for piece in generator.write(prompt + BETWEEN if respond else prompt, sampling, most):
            typer.echo(piece.encode(errors="replace"), nl=False)  # as bytes: the terminal's encoding may know fewer letters
    except TextError as error:
        typer.echo(f"edge-agent: the prompt {error.reason}", err=True)
        raise typer.Exit(exit_codes.USAGE) from error
    typer.echo()


def evaluate_file(settings: AgentSettings, source: FileSource, *, as_json: bool) -> None:
    """Print what the file's rows cost the checkpoint, with and without its side network."""
    model = open_language_model(
        settings.backbone.folder, settings.state_directory, threads=settings.backbone.threads, batch_size=settings.backbone.batch_size
    )
    refusals = Refusals()
    found: list[TextLoss] = []
    for samples in rows_of(source, refusals):
        found += [loss for loss in of_each(model.losses, samples, refusals) if loss is not None]
    tokens, text_bytes = sum(loss.tokens for loss in found), sum(loss.text_bytes for loss in found)
    nats, backbone_nats = sum(loss.nats for loss in found), sum(loss.backbone_nats for loss in found)
    report = {
        "samples": len(found),
        "tokens": tokens,
        "text_bytes": text_bytes,
        "metric": METRICS["causal-lm"].name,
        "score": bits_per_byte(nats, text_bytes) if text_bytes else None,
        "backbone_score": bits_per_byte(backbone_nats, text_bytes) if text_bytes else None,  # without the side network
        "perplexity": math.exp(nats / tokens) if tokens else None,
        "refused": refusals.refused,
        "checkpoint": model.generation,
        "peak_rss_mb": round(peak_rss_bytes() / 2**20, 1),
    }
    if as_json:
        typer.echo(json.dumps(report))
        return
    cost = "nothing to predict"
    if text_bytes:
        cost = f"{report['score']:.3f} {report['metric']} ({report['backbone_score']:.3f} without the side network), perplexity {report['perplexity']:.2f}"
    typer.echo(
        f"{len(found)} samples, {tokens} tokens: {cost}; {refusals.refused} refused; checkpoint {model.generation}; "
        f"peak memory {report['peak_rss_mb']} MB"
    )
