"""`edge-agent infer`: labels for a text or for a file's rows, with the score where the rows carry labels."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import typer

from edge_agent import exit_codes
from edge_agent.backbone import TextError
from edge_agent.health import peak_rss_bytes
from edge_agent.inference import CheckpointError, Prediction, Predictor, open_predictor
from edge_agent.memory import return_memory_early
from edge_agent.sample_files import FileSource
from edge_agent.samples import Refusal, RowError, Sample, label_index
from edge_agent.settings import AgentSettings, ConfigError, FileSourceSettings

ROWS_AT_A_TIME = 64
REFUSALS_SHOWN = 10


@dataclass
class _Sums:
    samples: int = 0
    labelled: int = 0
    correct: int = 0
    refused: int = 0
    predictions: list[dict[str, Any]] = field(default_factory=list)

    def refuse(self, detail: str) -> None:
        self.refused += 1
        if self.refused <= REFUSALS_SHOWN:
            typer.echo(f"refused: {detail}", err=True)
        elif self.refused == REFUSALS_SHOWN + 1:
            typer.echo("refused: more rows; they are counted", err=True)


def label_text(settings: AgentSettings, text: str | tuple[str, str], *, as_json: bool) -> None:
    predictor = _open(settings)
    try:
        [prediction] = predictor.predict([text])
    except TextError as error:
        typer.echo(f"edge-agent: the text {error.reason}", err=True)
        raise typer.Exit(exit_codes.USAGE) from error
    if as_json:
        typer.echo(json.dumps({**asdict(prediction), "checkpoint": predictor.generation}))
    else:
        typer.echo(f"{prediction.label}  {prediction.probability:.3f}  (checkpoint {predictor.generation})")


def label_file(settings: AgentSettings, path: Path, *, as_json: bool, with_predictions: bool) -> None:
    source = FileSource(_source_settings(settings, path), path.name, lambda _: False)
    predictor = _open(settings)
    sums = _Sums()
    while not source.exhausted:
        rows = source.poll(ROWS_AT_A_TIME)
        for refusal in rows:
            if isinstance(refusal, Refusal):
                sums.refuse(refusal.detail.removesuffix(" It is looked for again"))
                if refusal.reason in ("file missing", "file unreadable"):
                    raise typer.Exit(exit_codes.CRASH)
        _label(predictor, [row for row in rows if isinstance(row, Sample)], sums, keep=with_predictions)
    report = {
        "samples": sums.samples,
        "labelled": sums.labelled,
        "correct": sums.correct,
        "metric": "accuracy",
        "score": sums.correct / sums.labelled if sums.labelled else None,
        "refused": sums.refused,
        "checkpoint": predictor.generation,
        "peak_rss_mb": round(peak_rss_bytes() / 2**20, 1),
    }
    if as_json:
        typer.echo(json.dumps({**report, "predictions": sums.predictions} if with_predictions else report))
        return
    for row in sums.predictions:
        typer.echo(f"{row['label']}  {row['probability']:.3f}  {row['text']}")
    score = "no row carries a label" if report["score"] is None else f"{sums.correct} of {sums.labelled} right: {report['score']:.2%}"
    typer.echo(f"{sums.samples} samples, {score}; {sums.refused} refused; checkpoint {predictor.generation}; peak memory {report['peak_rss_mb']} MB")


def _label(predictor: Predictor, samples: list[Sample], sums: _Sums, *, keep: bool) -> None:
    known: list[tuple[Sample, int | None]] = []
    for sample in samples:
        try:
            known.append((sample, label_index(sample.label, predictor.labels)))
        except RowError as error:
            sums.refuse(f"{sample.where}: {error}")
    for (sample, label), prediction in zip(known, _predict(predictor, known, sums), strict=True):
        if prediction is None:
            continue
        sums.samples += 1
        sums.labelled += label is not None
        sums.correct += label == prediction.index
        if keep:
            text = sample.text if isinstance(sample.text, str) else " | ".join(sample.text)
            expected = None if label is None else predictor.labels[label]
            sums.predictions.append({"id": sample.id, "text": text, "expected": expected, **asdict(prediction)})


def _predict(predictor: Predictor, known: list[tuple[Sample, int | None]], sums: _Sums) -> list[Prediction | None]:
    """Predictions in order; None for a text that the backbone's tokenizer makes nothing of."""
    found: list[Prediction | None] = [None] * len(known)
    left = list(range(len(known)))
    while left:
        try:
            for place, prediction in zip(left, predictor.predict([known[i][0].text for i in left]), strict=True):
                found[place] = prediction
            break
        except TextError as error:
            sums.refuse(f"{known[left[error.index]][0].where}: the text {error.reason}")
            del left[error.index]
    return found


def _open(settings: AgentSettings) -> Predictor:
    return_memory_early()
    try:
        return open_predictor(
            settings.backbone.folder, settings.state_directory, threads=settings.backbone.threads, batch_size=settings.backbone.batch_size,
        )
    except CheckpointError as error:
        typer.echo(f"edge-agent: {error}", err=True)
        sys.stderr.flush()
        raise typer.Exit(exit_codes.CRASH) from error


def _source_settings(settings: AgentSettings, path: Path) -> FileSourceSettings:
    """The file's own settings (column names, labels) if it is one of the sources, else plain ones."""
    for source in settings.sources:
        if isinstance(source, FileSourceSettings) and source.path.absolute() == path.absolute():
            return source.model_copy(update={"follow": False, "rate_per_second": None, "send_labels": True})
    try:
        return FileSourceSettings(kind="file", path=path)
    except ValueError as error:
        raise ConfigError(f"--file {path}: its name must end in .jsonl, .ndjson or .csv, or one of these with .gz") from error
