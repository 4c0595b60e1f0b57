"""The cards in model_cards/ are what their reports render to."""

import json
from pathlib import Path

import pytest

from hf_gradiend.cards import KINDS, render_card

ROOT = Path(__file__).parents[2] / "model_cards"
FOLDERS = sorted(path for path in ROOT.glob("*") if path.is_dir())


@pytest.mark.skipif(not FOLDERS, reason="model_cards/ holds no folder")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_card_is_what_its_report_renders_to(folder, kind):
    report = json.loads((folder / "report.json").read_text("utf-8"))
    repo_id = json.loads((folder / "repos.json").read_text("utf-8"))[kind]

    expected = render_card(kind, report, repo_id)

    assert (folder / f"{kind}.md").read_bytes() == expected.encode()
