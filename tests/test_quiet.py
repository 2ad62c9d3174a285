"""Warnings of others that say nothing are not shown, and nothing else is hidden."""

import logging
import warnings
from collections.abc import Iterator

import pytest

from megalora import quiet
from megalora.quiet import NOISE, Noise
from megalora.training.changes import on_validating
from tests.test_first_minutes import flags

OF_PYTHON = [noise for noise in NOISE if noise.category is not None]
LOGGED = [noise for noise in NOISE if noise.category is None]
# What is said besides the beginning that a row has.
MORE = " and more"


@pytest.fixture(autouse=True)
def afterwards_all_is_shown() -> Iterator[None]:
    """Take away what a test installs."""
    with warnings.catch_warnings():
        yield
    for noise in LOGGED:
        logger = logging.getLogger(noise.source)
        logger.filters = [one for one in logger.filters if not isinstance(one, quiet._Dropped)]


def said(noise: Noise) -> str:
    """Return a message that a row is about."""
    first = noise.says.partition("|")[0]
    return first.replace("\\.", ".").replace("\\w+", "all_gather") + MORE


def shown(text: str, category: type[Warning], source: str) -> bool:
    """Say whether a warning of a module is shown."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.warn_explicit(text, category, "file.py", 1, module=source)
    return bool(caught)


@pytest.mark.parametrize("noise", OF_PYTHON, ids=lambda noise: noise.source)
def test_a_warning_that_says_nothing_is_dropped_by_module_and_message(noise: Noise) -> None:
    assert noise.category
    warnings.simplefilter("always")
    assert shown(said(noise), noise.category, noise.source)
    quiet.install()
    assert not shown(said(noise), noise.category, noise.source)
    assert shown(f"other: {said(noise)}", noise.category, noise.source)
    assert shown(said(noise), noise.category, f"{noise.source}.below")
    assert shown(said(noise), noise.category, "somebody.else")
    assert shown(said(noise), RuntimeWarning, noise.source)


@pytest.mark.parametrize("noise", LOGGED, ids=lambda noise: noise.source)
def test_a_logged_warning_that_says_nothing_is_dropped_by_logger_and_message(
    noise: Noise, caplog: pytest.LogCaptureFixture
) -> None:
    quiet.install()
    quiet.install()
    logger = logging.getLogger(noise.source)
    assert len([one for one in logger.filters if isinstance(one, quiet._Dropped)]) == 1
    logger.warning(said(noise))
    assert not caplog.records
    logger.error(said(noise))
    logger.warning("other: %s", said(noise))
    logging.getLogger("somebody.else").warning(said(noise))
    assert len(caplog.records) == 3


def test_the_environment_shows_all_of_them_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(quiet.SHOW, "1")
    warnings.simplefilter("always")
    quiet.install()
    for noise in NOISE:
        if noise.category:
            assert shown(said(noise), noise.category, noise.source)
        else:
            logging.getLogger(noise.source).warning(said(noise))
    assert len(caplog.records) == len(LOGGED)


def test_every_row_says_why() -> None:
    assert all(noise.why and noise.says and noise.source for noise in NOISE)


@pytest.mark.parametrize(("there", "changed"), [(True, {}), (False, {"enable_one_logger": False})])
def test_one_logger_is_asked_for_only_where_it_is_there(
    there: bool, changed: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megalora.training.changes.has_one_logger", lambda: there)
    args = flags()
    args.save = None
    assert on_validating(args) == changed
