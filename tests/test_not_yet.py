"""A family without a row is refused with what keeps it from having one."""

import re
from importlib.metadata import version
from pathlib import Path

import pytest

from megalora.model.config_json import family_of
from megalora.model.families import FAMILIES
from megalora.model.not_yet import LACKS, TRIED, UNWRITTEN, why_not_yet
from tests.support.hf_models import transformers

DOCS = Path(__file__).parents[1] / "docs" / "families.md"


def test_what_is_lacking_was_looked_for_in_this_megatron_core() -> None:
    assert version("megatron-core") == TRIED, "run tests/dist/test_not_yet.py and look again"


@pytest.mark.bad_input("a number that is not one")
@pytest.mark.parametrize("model_type", [*LACKS, *UNWRITTEN])
def test_a_family_without_a_row_is_refused_with_the_reason(model_type: str) -> None:
    reason = LACKS.get(model_type) or UNWRITTEN[model_type]
    with pytest.raises(
        ValueError, match=rf"model_type is '{model_type}': .*{re.escape(reason)}"
    ) as error:
        family_of({"model_type": model_type})
    assert ("megatron-core" in str(error.value)) == (model_type in LACKS)
    assert "supported are " in str(error.value)


def test_each_is_a_model_of_transformers_without_a_row() -> None:
    for model_type in (*LACKS, *UNWRITTEN):
        assert model_type in transformers.CONFIG_MAPPING, model_type
        assert model_type not in FAMILIES, model_type
        assert not (model_type in LACKS and model_type in UNWRITTEN), model_type
    assert why_not_yet("gpt2") == ""


def test_the_documentation_names_each() -> None:
    text = DOCS.read_text()
    _, _, section = text.partition("\n## Not yet\n")
    for model_type in (*LACKS, *UNWRITTEN):
        assert f"`{model_type}`" in section, model_type
