"""Token by token gives what all at once gives; sampling is bounded and repeatable; text comes in whole characters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from coordinator.backbones import prepare
from edge_agent.backbone import Backbone, TextError
from edge_agent.generation import Generator, Pieces, Sampling, Side, choose
from side_tuning.network.language import (
    LanguageAlignment,
    LanguageAlignmentConfig,
    LanguageLadder,
    LanguageLadderConfig,
)
from side_tuning.wire.messages import TapPlan
from tests.backbones.models import SENTENCES, save_random_model, stories_folder

DECODERS = ["opt", "opt-projected", "gpt2", "llama", "qwen2", "llama-yarn"]  # the last needs transformers
GREEDY = Sampling(temperature=0.0)


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> Any:
    kept: dict[str, Backbone] = {}

    def get(name: str) -> Backbone:
        if name not in kept:
            folder = tmp_path_factory.mktemp(name)
            model = stories_folder() if name == "stories" else save_random_model(name, folder / "model")
            prepare(model, folder / "artifact", weights="int8", max_tokens=32)
            kept[name] = Backbone.load(folder / "artifact")
        return kept[name]

    return get


def side_of(backbone: Backbone, *, trained: bool = True, every: int = 1, blocks: int = 3) -> Side:
    """A side network that changes something, or one as it is before the first step."""
    plan = TapPlan(1, (), blocks, mode="sequence", rank=16, max_tokens=32, task="causal-lm", last_rank=32, context_every=every)
    torch.manual_seed(5)
    head = Generator(backbone)._head
    alignment = LanguageAlignment(LanguageAlignmentConfig(16, head.token_width, head.width, 32, blocks))
    alignment.reset_projection(torch.Generator().manual_seed(1))
    if trained:
        torch.nn.init.normal_(alignment.up.weight, std=2.0)
    return Side(alignment.eval(), LanguageLadder(LanguageLadderConfig(32, blocks)).eval(), plan)


@torch.inference_mode()
def slowly(backbone: Backbone, side: Side | None, ids: list[int], prompt: int) -> torch.Tensor:
    """Logits after the last of `ids`, computed from all of them with nothing kept; the first `prompt` ids are the prompt."""
    generator = Generator(backbone, side)
    depth = backbone.manifest.layers
    states = backbone._forward([ids], range(1, depth + 1)).states
    h = states[depth][0, -1]
    if side is not None:
        every = side.plan.context_every
        rows = [place for place in range(len(ids)) if place >= prompt - 1 or (every and (prompt - 1 - place) % every == 0)]
        taps = [states[layer][0, rows] @ torch.from_numpy(backbone.map_matrix(layer, 16).copy()) for layer in side.plan.layers(depth)]
        embedded = generator._head.embed(torch.tensor([[ids[row] for row in rows]]))
        z, _ = side.ladder(*side.alignment.enter(torch.stack(taps)[None], embedded))
        h = side.alignment.leave(z[0, -1], h)
    table = generator._head.vocabulary
    return generator._head.before_vocabulary(h) @ table.rows(0, table.size).T


@pytest.mark.parametrize("every", [0, 1, 2])
@pytest.mark.parametrize("name", DECODERS)
def test_token_by_token_gives_the_logits_of_all_at_once(name: str, every: int, backbones: Any) -> None:
    backbone = backbones(name)
    ids = list(backbone.tokenizer.encode(SENTENCES[2] + " " + SENTENCES[0]).ids)
    for side in (None, side_of(backbone, every=every)):
        text = Generator(backbone, side).start()
        prompt = 6
        found = [text.feed(ids[:prompt]), *(text.feed([token]) for token in ids[prompt:])]
        for seen, logits in zip(range(prompt, len(ids) + 1), found, strict=True):
            torch.testing.assert_close(logits, slowly(backbone, side, ids[:seen], prompt), atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("name", [*DECODERS, "stories"])
def test_greedy_text_is_that_of_a_loop_that_keeps_nothing(name: str, backbones: Any) -> None:
    backbone = backbones(name)
    prompt = "Once upon a time" if name == "stories" else "play some music"
    for side in (None, side_of(backbone)):
        generator = Generator(backbone, side)
        ids = list(backbone.tokenizer.encode(prompt).ids)
        start = len(ids)
        for _ in range(12):
            best = int(slowly(backbone, side, ids, start)[: generator._known].argmax())
            if best in generator._ends:
                break
            ids.append(best)
        wanted = backbone.tokenizer.decode(ids)
        found = "".join(generator.write(prompt, GREEDY, max_new_tokens=12))
        assert backbone.tokenizer.decode(ids[:start]) + found == wanted


@pytest.mark.parametrize("name", [*DECODERS, "stories"])
def test_an_untrained_side_network_writes_what_the_backbone_writes(name: str, backbones: Any) -> None:
    backbone = backbones(name)
    prompt = "Once upon a time" if name == "stories" else "play some music"
    alone = "".join(Generator(backbone).write(prompt, GREEDY, max_new_tokens=20))
    together = "".join(Generator(backbone, side_of(backbone, trained=False)).write(prompt, GREEDY, max_new_tokens=20))
    changed = "".join(Generator(backbone, side_of(backbone)).write(prompt, GREEDY, max_new_tokens=20))
    assert alone == together != changed


def test_a_seed_repeats_the_text_and_the_end_token_ends_it(backbones: Any) -> None:
    generator = Generator(backbones("stories"))
    prompt = "Once upon a time"
    texts = ["".join(generator.write(prompt, Sampling(temperature=1.5, seed=seed), 24)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    first = next(generator.write(prompt, GREEDY))
    generator._ends = {int(generator.start().feed(generator._backbone.tokenizer.encode(prompt).ids).argmax())}
    assert first
    assert list(generator.write(prompt, GREEDY)) == []


def test_the_backbones_positions_are_the_end(backbones: Any) -> None:
    backbone = backbones("gpt2")
    generator = Generator(backbone)
    generator._ends = set()
    assert generator.longest == 40
    words = "".join(generator.write("play some music", GREEDY, max_new_tokens=500)).split()
    assert len(words) <= 37
    with pytest.raises(TextError, match=r"has .* tokens, the backbone takes 40 with the answer: shorten it"):
        list(generator.write(" ".join(SENTENCES * 5), GREEDY))
    with pytest.raises(TextError, match="no token that the backbone knows"):
        list(generator.write(" ", GREEDY))


def test_what_is_chosen_keeps_to_top_k_and_top_p() -> None:
    logits = torch.tensor([0.0, 3.0, 1.0, 2.9, -1.0])
    chance = torch.Generator().manual_seed(0)

    def chosen(sampling: Sampling) -> set[int]:
        return {choose(logits, sampling, chance) for _ in range(300)}

    assert chosen(GREEDY) == {1}
    assert chosen(Sampling(temperature=5.0, top_p=1.0)) == {0, 1, 2, 3, 4}
    assert chosen(Sampling(temperature=5.0, top_k=2, top_p=1.0)) == {1, 3}
    assert chosen(Sampling(temperature=1.0, top_p=0.6)) == {1, 3}
    assert chosen(Sampling(temperature=1.0, top_p=0.01)) == {1}
    frequency = sum(choose(logits, Sampling(temperature=1.0, top_p=1.0), chance) == 1 for _ in range(3000)) / 3000
    assert frequency == pytest.approx(float(torch.softmax(logits, 0)[1]), abs=0.03)


@pytest.mark.parametrize("values", [{"temperature": -0.1}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}, {"temperature": float("nan")}])
def test_impossible_sampling_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"temperature|top_k|top_p"):
        Sampling(**values)


def test_pieces_are_whole_characters_and_make_up_the_text() -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = trainers.BpeTrainer(vocab_size=256, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator([""], alphabet)  # every byte is a token
    text = " naïve “café” 🎉🎉 한국어"
    for used, prompt in ((tokenizer, "Zoë"), (Tokenizer.from_file(str(stories_folder() / "tokenizer.json")), "Zoë")):
        before = used.encode(prompt).ids
        ids = used.encode(prompt + text).ids
        assert ids[: len(before)] == before
        pieces = Pieces(used, before)
        found = [pieces.put(token) for token in ids[len(before) :]]
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in found)
        assert "".join(found) == text
        assert pieces.end() == ""


def test_bytes_that_are_no_character_are_not_held_for_ever() -> None:
    used = Tokenizer.from_file(str(stories_folder() / "tokenizer.json"))
    pieces = Pieces(used, used.encode("A").ids)
    broken = used.token_to_id("<0xFF>")
    given = "".join(pieces.put(broken) for _ in range(20)) + pieces.end()
    assert given.count("\N{REPLACEMENT CHARACTER}") == 20
