"""Where private samples come from: files, watched folders and local MQTT topics behind one interface.

Every source gives each sample once, across restarts too: it asks `seen`, which is the spool's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from edge_agent.sample_files import FileSource, FolderSource
from edge_agent.sample_rows import AnySourceSettings, Refusal, RowError, Sample, label_index, target_of
from edge_agent.settings import FileSourceSettings, FolderSourceSettings

__all__ = ["Refusal", "RowError", "Sample", "SampleSource", "label_index", "open_sources", "target_of"]


class SampleSource(Protocol):
    exhausted: bool  # nothing more will ever come

    def poll(self, limit: int) -> list[Sample | Refusal]:
        """Up to `limit` items that are there now; never waits. Empty does not mean exhausted."""

    def describe(self) -> str: ...

    def close(self) -> None: ...


def open_sources(settings: Sequence[AnySourceSettings], seen: Callable[[str], bool], *, state_directory: Path) -> list[SampleSource]:
    """One source for each entry, in their order. Files need not exist yet.

    Args:
        settings: the `[[sources]]`.
        seen: whether a sample was taken in an earlier run: `Spool.seen`.
        state_directory: where messages of local topics are kept until they are in the spool.

    """
    sources: list[SampleSource] = []
    names: dict[str, int] = {}
    for entry in settings:
        name = entry.name or (entry.path.name if isinstance(entry, FileSourceSettings | FolderSourceSettings) else entry.topic)
        names[name] = names.get(name, 0) + 1
        if names[name] > 1:  # two files of one name hold different samples
            name = f"{name}#{names[name]}"
        if isinstance(entry, FileSourceSettings):
            sources.append(FileSource(entry, name, seen))
        elif isinstance(entry, FolderSourceSettings):
            sources.append(FolderSource(entry, name, seen))
        else:
            from edge_agent.sample_topic import TopicSource  # brings the MQTT client, which files do without

            sources.append(TopicSource(entry, name, seen, state_directory / "inbox"))
    return sources
