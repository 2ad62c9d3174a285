"""Which checkpoint is taken, whatever a killed save or a bad disk left of the newest."""

import hashlib
import json
from pathlib import Path

import pytest

from tests.support.forked import call

DESCRIPTION = {"config": {}, "model": {}}


def save(root: Path, iteration: int, *, manifest: bool = True, tracker: bool = True) -> Path:
    """Write what Megatron's save leaves, in its order, of a file of 1000 bytes."""
    directory = root / f"iter_{iteration:07d}"
    directory.mkdir(parents=True)
    data = bytes([iteration]) * 1000
    (directory / "__0_0.distcp").write_bytes(data)
    if manifest:
        digests = {"__0_0.distcp": hashlib.sha256(data).hexdigest()}
        text = json.dumps({"algorithm": "sha256", "files": digests})
        (directory / "integrity.json").write_text(text)
    if tracker:
        (root / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    return directory


def find(root: Path, on_corrupt: str = "previous", step: int | None = None) -> tuple:
    """Return iteration, warnings and error of `find_checkpoint`."""
    return call(_find, root, on_corrupt, step)


def _find(root: Path, on_corrupt: str, step: int | None) -> tuple[int | None, list[str], str]:

    from megalora.checkpoint import find

    warnings: list[str] = []
    find.read_description = lambda directory: DESCRIPTION
    try:
        found = find.find_checkpoint(
            root,
            step=step,
            on_corrupt=on_corrupt,  # type: ignore[arg-type]
            warn=warnings.append,
        )
    except ValueError as error:
        return None, warnings, str(error)
    return found.iteration if found else None, warnings, ""


def tracked(root: Path) -> str:
    return (root / "latest_checkpointed_iteration.txt").read_text()


def test_an_empty_directory_has_no_checkpoint(tmp_path: Path) -> None:
    assert find(tmp_path) == (None, [], "")


def test_the_newest_intact_checkpoint_is_taken(tmp_path: Path) -> None:
    save(tmp_path, 2)
    save(tmp_path, 4)
    assert find(tmp_path) == (4, [], "")


def test_a_save_that_was_killed_is_passed_over_in_silence(tmp_path: Path) -> None:
    save(tmp_path, 2)
    save(tmp_path, 4, manifest=False, tracker=False)
    assert find(tmp_path) == (2, [], "")


@pytest.mark.bad_input("a malformed file")
def test_a_flipped_bit_is_named_and_the_checkpoint_before_is_taken(tmp_path: Path) -> None:
    save(tmp_path, 2)
    file = save(tmp_path, 4) / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    data[500] ^= 1
    file.write_bytes(data)
    iteration, warnings, error = find(tmp_path)
    assert (iteration, error) == (2, "")
    assert "iter_0000004: __0_0.distcp does not match its checksum" in warnings[0]
    # Another kill before the next save must not find the tracker on the damaged one.
    assert tracked(tmp_path) == "2"


@pytest.mark.bad_input("a malformed file")
@pytest.mark.parametrize("damage", ["truncated", "missing", "manifest"])
def test_a_torn_checkpoint_is_named(tmp_path: Path, damage: str) -> None:
    save(tmp_path, 2)
    file = save(tmp_path, 4) / "__0_0.distcp"
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:100])
    elif damage == "missing":
        file.unlink()
    else:
        file = file.with_name("integrity.json")
        file.write_bytes(file.read_bytes()[:20])
    iteration, warnings, _ = find(tmp_path)
    assert iteration == 2
    assert file.name in warnings[0]


def test_stop_names_the_damage_and_what_would_be_taken(tmp_path: Path) -> None:
    save(tmp_path, 2)
    (save(tmp_path, 4) / "__0_0.distcp").write_bytes(b"")
    iteration, _, error = find(tmp_path, "stop")
    assert iteration is None
    assert "iter_0000004" in error
    assert "Iteration 2 is intact" in error
    assert tracked(tmp_path) == "4"


@pytest.mark.parametrize("text", ["", "\x00\x00", "4x"])
def test_a_torn_tracker_file_is_written_anew(tmp_path: Path, text: str) -> None:
    save(tmp_path, 2)
    save(tmp_path, 4)
    save(tmp_path, 6, manifest=False, tracker=False)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(text)
    assert find(tmp_path)[0] == 4
    assert tracked(tmp_path) == "4"


def test_a_kill_before_the_first_tracker_file_loses_nothing(tmp_path: Path) -> None:
    save(tmp_path, 2, tracker=False)
    assert find(tmp_path)[0] == 2
    assert tracked(tmp_path) == "2"


def test_all_damaged_is_an_error_and_not_a_new_start(tmp_path: Path) -> None:
    (save(tmp_path, 2) / "__0_0.distcp").write_bytes(b"")
    iteration, _, error = find(tmp_path)
    assert iteration is None
    assert "no intact checkpoint" in error


def test_an_older_iteration_is_taken_where_the_user_sets_the_tracker_back(tmp_path: Path) -> None:
    save(tmp_path, 2)
    save(tmp_path, 4)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("2")
    assert find(tmp_path) == (2, [], "")


def test_a_release_is_taken_where_the_tracker_file_names_it(tmp_path: Path) -> None:
    save(tmp_path, 2).rename(tmp_path / "release")
    save(tmp_path, 4)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release")
    assert find(tmp_path) == (0, [], "")
    assert find(tmp_path, step=4) == (0, [], "")


def test_a_release_is_older_than_any_iteration(tmp_path: Path) -> None:
    save(tmp_path, 2).rename(tmp_path / "release")
    (save(tmp_path, 4) / "__0_0.distcp").write_bytes(b"")
    assert find(tmp_path)[0] == 0
    assert tracked(tmp_path) == "release"


def test_a_torn_tracker_file_is_written_for_the_step_that_is_asked_for(tmp_path: Path) -> None:
    save(tmp_path, 2)
    save(tmp_path, 4)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("")
    assert find(tmp_path, step=2)[0] == 2
    # Megatron reads it before it looks at --ckpt-step, and would end without an error.
    assert tracked(tmp_path) == "2"


def test_a_torn_tracker_file_without_checkpoints_starts_anew_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("")
    iteration, warnings, error = find(tmp_path)
    assert (iteration, error) == (None, "")
    assert "starting anew" in warnings[0]


def test_a_step_that_is_asked_for_is_taken_or_refused(tmp_path: Path) -> None:
    save(tmp_path, 2)
    save(tmp_path, 4)
    assert find(tmp_path, step=2)[0] == 2
    assert tracked(tmp_path) == "4"
    assert "iter_0000003" in find(tmp_path, step=3)[2]
