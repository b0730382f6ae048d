"""Profiles: the size of a run of the notebooks, one YAML file each with a section of settings for each notebook.

`quick` names every setting that a notebook has; other profiles give only the values that differ.
"""

from pathlib import Path

import yaml

FOLDER = Path(__file__).resolve().parent


def built_in_profiles() -> list[str]:
    """Names of the profiles that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_profile(profile: str) -> dict[str, dict]:
    """The sections by notebook of a built-in profile or of a YAML file of one's own, as written there.

    Raises:
        ValueError: for an unknown name, or a file that is not a mapping of mappings with words as keys.
    """
    path = FOLDER / f"{profile}.yaml"
    if profile.endswith((".yaml", ".yml")):
        path = Path(profile)
    if not path.is_file():
        known = ", ".join(built_in_profiles())
        raise ValueError(f"Profile {profile!r} is unknown; choose one of {known}, or give the path of a YAML file.")
    try:
        sections = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"Profile {path} is not valid YAML ({reason}); correct that line.") from error
    if not isinstance(sections, dict) or not all(isinstance(v, dict) for v in sections.values()):
        raise ValueError(f"Profile {path} must have one section of `setting: value` lines for each notebook.")
    if found := _no_word(sections):
        raise ValueError(f"Profile {path} has the key {found[0]!r}, which is no word: put it in quotes.")
    return sections


def _no_word(values: object) -> list:
    """The keys in mappings of `values`, at any depth, that YAML reads as a number, a date or a truth value."""
    if isinstance(values, list):
        return [key for value in values for key in _no_word(value)]
    if not isinstance(values, dict):
        return []
    return [key for key in values if not isinstance(key, str)] + _no_word(list(values.values()))


def load_settings(profile: str, notebook: str) -> dict:
    """The settings of one notebook in a profile, e.g. `load_settings("quick", "06_latency")`; `quick`'s by default.

    Raises:
        ValueError: for an unknown profile, or a setting that `quick` does not name.
    """
    defaults, section = (load_profile(name).get(notebook, {}) for name in ("quick", profile))
    unknown = [name for name in section if defaults and name not in defaults]
    if unknown:
        raise ValueError(
            f"Setting {unknown[0]!r} in section {notebook} of profile {profile!r} is unknown; choose from "
            f"{', '.join(defaults)}."
        )
    return defaults | section
