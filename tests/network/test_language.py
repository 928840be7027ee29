"""The side network of a language model: causal, a beginning that changes nothing, keys and values kept, loss in pieces."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from side_tuning.network import vocabulary
from side_tuning.network.files import (
    NetworkFileError,
    load_ladder,
    load_language_alignment,
    load_language_ladder,
    save_alignment,
    save_ladder,
)
from side_tuning.network.language import (
    LanguageAlignment,
    LanguageAlignmentConfig,
    LanguageLadder,
    LanguageLadderConfig,
)
from side_tuning.network.vocabulary import (
    FloatVocabulary,
    Int8Vocabulary,
    Vocabulary,
    mean_loss,
    token_losses,
)
from side_tuning.wire.messages import CodecName

N, B, T, S, R, E, D = 2, 3, 7, 16, 12, 10, 24


def made() -> tuple[LanguageAlignment, LanguageLadder]:
    torch.manual_seed(0)
    alignment = LanguageAlignment(LanguageAlignmentConfig(width_in=R, token_width=E, width=D, side_width=S, blocks=B))
    ladder = LanguageLadder(LanguageLadderConfig(side_width=S, blocks=B))
    torch.nn.init.normal_(alignment.up.weight)
    return alignment.eval(), ladder.eval()


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(shape, generator=generator) for shape in ((N, B, T, R), (N, T, E), (N, T, D)))  # type: ignore[return-value]


def hidden(alignment: LanguageAlignment, ladder: LanguageLadder, x: torch.Tensor, e: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    z, _ = ladder(*alignment.enter(x, e))
    return alignment.leave(z, last)


def test_no_row_sees_what_comes_after_it() -> None:
    alignment, ladder = made()
    x, e, last = inputs()
    before = hidden(alignment, ladder, x, e, last)
    x[:, :, 4:], e[:, 4:], last[:, 4:] = 9.0, -9.0, 9.0
    after = hidden(alignment, ladder, x, e, last)
    torch.testing.assert_close(before[:, :4], after[:, :4])
    assert (before[:, 4:] - after[:, 4:]).abs().min() > 0


def test_rows_one_by_one_give_what_all_at_once_give() -> None:
    alignment, ladder = made()
    x, e, last = inputs()
    wanted = hidden(alignment, ladder, x, e, last)
    past, found = None, []
    for start, end in ((0, 3), (3, 4), (4, 6), (6, 7)):
        z, past = ladder(*alignment.enter(x[:, :, start:end], e[:, start:end]), past)
        found.append(alignment.leave(z, last[:, start:end]))
    torch.testing.assert_close(torch.cat(found, 1), wanted, atol=1e-5, rtol=1e-5)


def test_an_untrained_side_network_changes_no_prediction() -> None:
    alignment = LanguageAlignment(LanguageAlignmentConfig(width_in=R, token_width=E, width=D, side_width=S, blocks=B))
    ladder = LanguageLadder(LanguageLadderConfig(side_width=S, blocks=B))
    x, e, last = inputs()
    found = hidden(alignment, ladder, x, e, last).detach()
    torch.testing.assert_close(F.layer_norm(found, (D,)), F.layer_norm(last, (D,)), atol=1e-4, rtol=1e-4)
    assert torch.sigmoid(alignment.mix_logits.detach()).mean() == pytest.approx(0.73)


def test_taps_that_do_not_fit_are_refused() -> None:
    _, ladder = made()
    with pytest.raises(ValueError, match="do not fit 3 blocks of width 16"):
        ladder(torch.zeros(1, 2, 5, S), torch.zeros(1, 5, S))


def test_a_side_width_that_no_head_fits_is_refused() -> None:
    with pytest.raises(ValueError, match="no multiple of 4 heads"):
        LanguageLadderConfig(side_width=18, blocks=1)


def vocabularies() -> list[Vocabulary]:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(50, E, generator=generator)
    scale = weight.abs().amax(1, keepdim=True) / 127
    return [FloatVocabulary(weight), Int8Vocabulary((weight / scale).round().to(torch.int8), scale)]


@pytest.mark.parametrize("entries", vocabularies())
def test_loss_and_gradient_in_pieces_are_those_of_the_whole(entries: Vocabulary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "LOGITS_AT_A_TIME", 150)  # three rows
    monkeypatch.setattr(vocabulary, "VOCABULARY_AT_A_TIME", 16)
    h = torch.randn(11, E, generator=torch.Generator().manual_seed(3))
    targets = torch.arange(11) * 4
    pieces, whole = h.clone().requires_grad_(), h.clone().requires_grad_()
    found = mean_loss(pieces, entries, targets)
    wanted = F.cross_entropy(whole @ entries.rows(0, 50).T, targets)
    (2 * found).backward()
    (2 * wanted).backward()
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(pieces.grad, whole.grad)
    losses, right = token_losses(h, entries, targets)
    torch.testing.assert_close(losses.mean(), wanted)
    assert right.tolist() == ((h @ entries.rows(0, 50).T).argmax(-1) == targets).tolist()


@pytest.mark.parametrize(("precision", "lost"), [(None, 1e-6), ("int8", 0.05), ("int4", 0.12)])
def test_the_files_of_a_language_model_come_back(precision: CodecName | None, lost: float) -> None:
    alignment, ladder = made()
    x, e, last = inputs()
    back, back_ladder = (
        load_language_alignment(save_alignment(alignment, precision=precision)),
        load_language_ladder(save_ladder(ladder, precision=precision)),
    )
    assert (back.config, back_ladder.config) == (alignment.config, ladder.config)
    wanted, found = hidden(alignment, ladder, x, e, last).detach(), hidden(back, back_ladder, x, e, last).detach()
    assert float((found - wanted).norm() / wanted.norm()) < lost


def test_files_of_classification_and_of_language_models_are_not_taken_for_each_other() -> None:
    alignment, ladder = made()
    with pytest.raises(NetworkFileError, match="kind 'ladder'"):
        load_ladder(save_ladder(ladder))
    with pytest.raises(NetworkFileError, match="kind 'language-alignment'"):
        load_language_alignment(save_alignment(alignment.taps))
