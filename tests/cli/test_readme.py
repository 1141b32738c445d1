"""What the README says about settings and commands is what there is."""

import re
from pathlib import Path

from halfstep.service.cli.app import OWNERS
from halfstep.service.contract.precision import SUPPORTED_MODES, MixedPrecisionMode
from halfstep.service.settings import Settings

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_table_names_every_setting_and_its_default() -> None:
    table = README[README.index("| setting |") : README.index("## What is guaranteed")]
    named = dict.fromkeys(name.lower() for name in re.findall(r"`HALFSTEP_([A-Z_]+)`", table))
    assert list(named) == list(dict.fromkeys(named))
    assert set(named) == set(Settings.model_fields)
    for line in table.splitlines()[2:]:
        if not line.startswith("|"):
            continue
        names, defaults = (re.findall(r"`([^`]*)`", cell) for cell in line.split("|")[1:3])
        for name, shown in zip(names, defaults, strict=False):
            default = Settings.model_fields[name.removeprefix("HALFSTEP_").lower()].default
            if isinstance(default, float):
                assert float(shown) == default, name
            elif default == ():
                assert shown == "[]", name
            else:
                assert shown == str(default), name


def test_the_commands_it_names_exist() -> None:
    known = {name for names in OWNERS.values() for name in names}
    named = set(re.findall(r"(?<!from )\bhalfstep ([a-z]+)\b", README))
    assert named <= known
    assert {"up", "submit", "watch", "keys", "migrate", "worker", "dispatch", "api"} <= named


def test_the_files_it_names_exist() -> None:
    for name in set(re.findall(r"(?:docker|examples|docs|service|worker)/[\w./-]+\w", README)):
        assert (ROOT / name).exists() or name == "docker/secrets/api_key", name


def test_make_targets_it_names_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for name in set(re.findall(r"\bmake (\w+)", README)):
        assert re.search(rf"^{name}:.*##", makefile, re.MULTILINE), name


def test_modes_that_are_refused_are_among_the_limits() -> None:
    refused = set(MixedPrecisionMode) - SUPPORTED_MODES
    limits = README[README.index("## What it does not do yet") :]
    assert all(f"`{mode.value}`" in limits for mode in refused)
