"""What `megalora inspect` measures and draws is what torch.linalg says of the adapter."""

import argparse
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.linalg import matrix_norm

from megalora.__main__ import main
from megalora.hf import picture
from megalora.hf.factors import LoRAFactors
from megalora.hf.inspect import AdapterReport, describe, measure, measure_all
from megalora.hf.peft import write_adapter
from megalora.training.log_flags import add_log_args

LAYERS, EXPERTS = 24, 3
PANELS = [name for row in picture.PANELS for name, _ in row]


def factors_of(rank: int, num_in: int, num_out: int, seed: int) -> LoRAFactors:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(shape, generator=generator) for shape in ((rank, num_in), (num_out, rank)))
    return LoRAFactors(a, b, 0.7)


@pytest.fixture(scope="module")
def factors() -> dict[str, LoRAFactors]:
    """Linears of many layers, experts of the last ones, and one in no layer."""
    names = [f"model.layers.{layer}.self_attn.{q}_proj" for layer in range(LAYERS) for q in "qk"]
    names += [
        f"model.layers.{layer}.mlp.experts.{expert}.down_proj"
        for layer in range(LAYERS // 2, LAYERS)
        for expert in range(EXPERTS)
    ]
    found = {name: factors_of(4, 24, 16, seed) for seed, name in enumerate(names)}
    return {**found, "lm_head": factors_of(4, 24, 64, len(names))}


@pytest.fixture(scope="module")
def report(factors: dict[str, LoRAFactors]) -> AdapterReport:
    return describe(factors, directory="some/adapter", kind="PEFT adapter", base_model="some/base")


@pytest.mark.parametrize(("rank", "num_in", "num_out"), [(1, 5, 7), (4, 24, 16), (9, 6, 70000)])
def test_norms_are_those_of_dense_matrices(rank: int, num_in: int, num_out: int) -> None:
    own = factors_of(rank, num_in, num_out, 0)
    found = measure("x", own)
    a, b = own.lora_A.double(), own.lora_B.double()
    # B = Q R, and Q turns without changing a length.
    update = 0.7 * torch.linalg.qr(b).R @ a
    for name, matrix in (("a", a), ("b", b), ("update", update)):
        assert getattr(found, f"norm_{name}") == pytest.approx(float(matrix_norm(matrix)))
        assert getattr(found, f"spectral_{name}") == pytest.approx(float(matrix_norm(matrix, 2)))


def test_modules_of_several_ranks_keep_their_order() -> None:
    own = {f"m{rank}": factors_of(rank, 8, 8, rank) for rank in (3, 1, 2, 3, 1)}
    found = measure_all(own)
    assert [module.name for module in found] == list(own)
    assert found == [measure(name, module) for name, module in own.items()]


@pytest.mark.bad_input("a number that is not one")
def test_of_what_is_not_finite_the_rest_is_measured() -> None:
    own = factors_of(2, 8, 8, 0)
    own.lora_B[0, 0] = torch.inf
    found = measure("x", own)
    assert found.spectral_a == pytest.approx(float(matrix_norm(own.lora_A, 2)))
    assert found.spectral_b != found.spectral_b
    assert found.norm_update != found.norm_update


def test_each_panel_has_every_kind_by_layer(report: AdapterReport) -> None:
    figure: Any = picture.figure_of(report)
    assert len(figure.axes) == len(PANELS)
    for axes, name in zip(figure.axes, PANELS, strict=True):
        drawn = {line.get_label(): line for line in axes.lines}
        own = [getattr(m, name) for m in report.modules if m.name.endswith("k_proj")]
        assert drawn["self_attn.k_proj"].get_ydata() == pytest.approx(own)
        assert list(drawn["self_attn.k_proj"].get_xdata()) == list(range(LAYERS))
        of_experts = [getattr(m, name) for m in report.modules if ".experts." in m.name]
        means = torch.tensor(of_experts).view(-1, EXPERTS).mean(1)
        line = drawn["mlp.experts.*.down_proj"]
        assert line.get_ydata() == pytest.approx(means.tolist(), rel=1e-5)
        assert list(line.get_xdata()) == list(range(LAYERS // 2, LAYERS))
        (head,) = drawn["lm_head"].get_xdata()
        assert head > LAYERS
    scales = [axes.get_ylim() for axes in figure.axes]
    assert scales[0] == scales[1]
    assert scales[2] == scales[3]


def test_no_text_covers_another(report: AdapterReport) -> None:
    figure: Any = picture.figure_of(report)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    texts = [figure._suptitle, *legend.get_texts()]
    for axes in figure.axes:
        # Those of the upper row are hidden: they are those of the lower one.
        ticks = [*axes.get_xticklabels(), *axes.get_yticklabels()]
        texts += [t for t in (*ticks, axes.xaxis.label, axes._left_title) if t.get_visible()]
    boxes = [text.get_window_extent() for text in texts if text.get_text()]
    covered = [
        (one, other)
        for number, one in enumerate(boxes)
        for other in boxes[:number]
        if one.overlaps(other)
    ]
    assert not covered


def test_the_command_prints_and_draws(
    factors: dict[str, LoRAFactors], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_adapter(tmp_path / "a", factors, base_model_name="some/base")
    file = tmp_path / "a.png"
    assert main(["inspect", str(tmp_path / "a"), "--plot", str(file)]) == 0
    said = capsys.readouterr().out
    assert f"drawn in {file}" in said
    above = sum(m.spectral_b > m.spectral_a for m in measure_all(factors))
    assert 0 < above < len(factors)
    assert f"B's spectral norm is above A's in {above} of {len(factors)} modules" in said
    assert file.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "a.png"]


@pytest.mark.bad_input("a mistyped command line")
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("there.png", "exists already: give another name"),
        ("a.jpg", "ends in none of .png, .svg, .pdf"),
        ("gone/a.png", "is in no directory that exists: make"),
    ],
)
def test_a_picture_that_cannot_be_written_is_refused_first(
    name: str, said: str, tmp_path: Path
) -> None:
    (tmp_path / "there.png").write_text("mine")
    with pytest.raises(ValueError, match=said):
        picture.check_picture(str(tmp_path / name))
    assert (tmp_path / "there.png").read_text() == "mine"


def test_without_matplotlib_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match="needs matplotlib, which is missing: install it"):
        picture.check_picture(str(tmp_path / "a.png"))


@pytest.mark.bad_input("a write that fails")
def test_a_picture_is_written_whole_or_not_at_all(
    report: AdapterReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(_: Any, path: Path, **__: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    figure = type(picture.figure_of(report))
    monkeypatch.setattr(figure, "savefig", fill)
    with pytest.raises(ValueError, match="cannot be written"):
        picture.draw(report, str(tmp_path / "a.png"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.bad_input("a mistyped command line")
@pytest.mark.parametrize("given", ["0", "-1", "1.5", "often"])
def test_an_interval_of_logging_is_a_whole_number(
    given: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    add_log_args(parser)
    with pytest.raises(SystemExit):
        parser.parse_args([f"--lora-log-interval={given}"])
    assert f"{given} is no interval: give a whole number of iterations" in capsys.readouterr().err
