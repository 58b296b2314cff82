"""Data sets from local files, folders and the Hub, and mixtures of them."""

from collections import Counter
from glob import escape
from pathlib import Path
from typing import Any

import datasets
from trl import DatasetMixtureConfig, ScriptArguments

from .._util.hub import why_no_data
from ..errors import RecipeError
from ..tokens.layouts import align, arrange
from ..tokens.names import REFERENCE, TOKEN_WEIGHT, WEIGHT
from .local_files import find_fault, is_shifted, local_files, open_binary
from .paths import COMPRESSED, LOCAL_FORMATS, format_of, missing

OPTIONAL = (WEIGHT, TOKEN_WEIGHT, REFERENCE)  # columns that the splits of a data set may have each for itself

COMMIT = 40  # characters of the hash of what the Hub has given; that of a folder is shorter

TEXTS = ("prompt", "completion", "text", "messages", "conversations")


def load_dataset(script: ScriptArguments) -> Any:
    """Load `dataset_name`, a local file or folder or a Hub id; a mapping of splits."""
    name = script.dataset_name or ""
    path = Path(name).expanduser()
    shifted = (file for file in local_files(script.dataset_name) if format_of(file) == "csv" and is_shifted(file))
    if fault := find_fault(shifted):
        raise ValueError(fault)
    if path.is_file():
        return _load_file(path, script.dataset_train_split, script.dataset_streaming)
    if fault := missing(name):
        raise FileNotFoundError(fault)
    if not path.is_dir():
        _refuse_cached_folder(name, script.dataset_config)
    source = _folder(path) if path.is_dir() else {"path": name}
    try:
        splits = datasets.load_dataset(**source, name=script.dataset_config, streaming=script.dataset_streaming)
    except datasets.exceptions.DatasetGenerationError as error:
        if not isinstance(error.__cause__, datasets.table.CastError):  # the first split lacks a column that another has
            raise
        splits = _split_by_split(source)
        names = [{*dataset.column_names} - {*OPTIONAL} for dataset in splits.values()]
        if any(each != names[0] for each in names):
            raise
    return _without_filled(splits)


def _refuse_cached_folder(name: str, config: str | None) -> None:
    """Raise FileNotFoundError if `name` can't be had, or `datasets` would give its cache of a folder elsewhere.

    It gives that where the Hub can't be reached, for any folder of that name which it has read before.
    """
    if name.count("/") < 2 and (fault := why_no_data(name)):
        raise FileNotFoundError(f"{fault}. Correct the name, or download the data set.")
    if "/" not in name and len(datasets.load_dataset_builder(name, config).hash or "") < COMMIT:
        raise FileNotFoundError(
            f"there is no file or folder {name} in {Path.cwd()}, the Hub does not give it, and the cache has one from elsewhere"
        )


def _load_file(path: Path, split: str, streaming: bool) -> Any:
    found = format_of(path)
    if found is None:
        raise ValueError(f"{path.suffix!r} is none of {', '.join(LOCAL_FORMATS)}, nor one of these in {', '.join(COMPRESSED)}")
    with open_binary(path):  # which may need a package
        pass
    return datasets.load_dataset(found, data_files={split: escape(str(path))}, streaming=streaming, **_texts(found))


def _folder(path: Path) -> dict[str, Any]:
    """Return what `datasets` needs to load a local folder, which it takes for a pattern if it holds `[`, `*` or `?`."""
    path = path.resolve()  # `text` is a format's name too, and `.` none at all
    formats = Counter(filter(None, map(format_of, local_files(path))))
    texts = _texts(*formats)
    if escape(str(path)) == str(path) or not formats:
        return {"path": str(path), **texts}
    return {"path": formats.most_common(1)[0][0], "data_dir": escape(str(path)), **texts}


def _texts(*formats: str) -> dict[str, Any]:
    """Return what keeps pandas from reading the texts of CSV files as numbers, truth values and nulls, such as `NA`."""
    if formats != ("csv",):
        return {}
    return {"converters": dict.fromkeys(TEXTS, str), "keep_default_na": False, "na_values": [""]}


def load_mixture(mixture: DatasetMixtureConfig, text_field: str, num_proc: int | None = None) -> Any:
    """Load and mix the data sets of `datasets`; a mapping of splits. Raises RecipeError if their layouts differ."""
    parts = []
    for entry in mixture.datasets:
        dataset = _load_entry(entry, mixture.streaming)
        dataset = dataset if entry.columns is None else dataset.select_columns(entry.columns)
        parts.append(arrange(dataset, f"the data set {_source(entry)}", text_field, num_proc))
    fractions = [getattr(entry, "fraction", None) for entry in mixture.datasets]  # not in the oldest TRL
    parts = _shares(parts, fractions, mixture.streaming)
    sources = [_source(entry) for entry in mixture.datasets]
    joined = datasets.concatenate_datasets(align(parts, sources, text_field, num_proc))
    if mixture.test_split_size is None:
        return datasets.DatasetDict({"train": joined})
    return joined.train_test_split(test_size=mixture.test_split_size)


def _source(entry: Any) -> str:
    """Return what tells an entry of a mixture from the others: its files, else its path."""
    return str(entry.data_files or entry.path)


def _load_entry(entry: Any, streaming: bool) -> Any:
    """Load the split of a data set that is part of a mixture."""
    path, own = Path(entry.path).expanduser(), entry.data_files or entry.data_dir
    if path.is_file():
        return _load_file(path, entry.split, streaming)[entry.split]
    where = {"path": entry.path, "data_dir": entry.data_dir and _literal(entry.data_dir), **_texts(entry.path)}
    if path.is_dir() and not own:
        where |= _folder(path)
    elif not own:
        _refuse_cached_folder(entry.path, entry.name)
    files = _literal(entry.data_files, path)
    return datasets.load_dataset(**where, name=entry.name, data_files=files, split=entry.split, streaming=streaming)


def _literal(source: Any, base: Path | None = None) -> Any:
    """Return data files with the paths among them that exist kept from being taken for patterns."""
    if isinstance(source, dict):
        return {key: _literal(value, base) for key, value in source.items()}
    if isinstance(source, (list, tuple)):
        return [_literal(value, base) for value in source]
    exists = source and (Path(source).exists() or (base is not None and (base / source).exists()))
    return escape(str(source)) if exists else source


def _shares(parts: list[Any], fractions: list[float | None], streaming: bool) -> list[Any]:
    """Return of each data set as many rows as `fractions` of the largest mixture that repeats none."""
    weights = [each for each in fractions if each is not None]
    if not weights:
        return parts
    if streaming or len(weights) < len(parts) or sum(weights) <= 0:
        why = "the data sets are streamed" if streaming else "only some of `datasets` have one above 0"
        raise RecipeError(f"Cannot mix by `fraction`: {why}. Give each a `fraction` without `streaming`, or none.")
    shares = [weight / sum(weights) for weight in weights]
    size = min(len(part) / share for part, share in zip(parts, shares, strict=True) if share > 0)
    return [part.select(range(round(share * size))) for part, share in zip(parts, shares, strict=True)]


def _split_by_split(source: dict[str, Any]) -> datasets.DatasetDict:
    """Load each split of a folder or a Hub id for itself, with columns of its own."""
    files = datasets.load_dataset_builder(**source).config.data_files or {}
    texts = {key: value for key, value in source.items() if key not in ("path", "data_dir")}
    return datasets.DatasetDict(
        {
            split: datasets.load_dataset(source["path"], data_files={split: list(map(escape, found))}, split=split, **texts)
            for split, found in files.items()
        }
    )


def _without_filled(splits: Any) -> Any:
    """Return splits without the columns for the trainer that some lack, which loading gives to all, filled with None."""
    for split, dataset in splits.items() if isinstance(splits, datasets.DatasetDict) else ():
        filled = [
            column
            for column in {*OPTIONAL} & {*dataset.column_names}
            if len(dataset) and dataset.data.column(column).null_count == len(dataset)
        ]
        splits[split] = dataset.remove_columns(filled)
    return splits
