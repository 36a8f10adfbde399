"""From rows to packed samples on disk: what a fine-tuning run does once, before its first step."""

import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

from plait.checkpoint.chat_template import ChatTemplate, choose_chat_template
from plait.checkpoint.huggingface import end_tokens, load_config, load_tokenizer
from plait.checkpoint.json_file import read_json_object, write_json, write_text
from plait.errors import CheckpointError, DataError, ModelError
from plait.train.chat_rows import ChatEncoder, PreferenceEncoder, special_tokens, unread_fields
from plait.train.encode_rows import Encoder, encode_rows
from plait.train.packing import write_packed
from plait.train.row_files import file_hashes, model_hashes
from plait.train.rows import Problem, Problems, Row, other_files, read_rows
from plait.train.run_folder import RunFolder, adapter_folder
from plait.train.tuning_job import TuningJob
from plait.train.watch import Watch

_NAMED_FILES = 100
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
)


def prepare_tuning(job: TuningJob, model_folder: Path, run: RunFolder, watch: Watch) -> None:
    """Write tokenizer, packed rows and `data.json`, unless the run has them already.

    Raises DataError naming file and line of a row that cannot be used, unless these are skipped.
    """
    if run.data.exists():
        return
    _copy_tokenizer(job, model_folder, run)
    facts: dict[str, object] = {}
    encoder, pad = _encoder(job, model_folder, run)
    sets = {"train": job.data, **{name_of(path): path for path in job.evaluation_data}}
    if len(sets) != 1 + len(job.evaluation_data):
        raise DataError("evaluation_data has two sets of one name, or one called train.")
    run.train_tokens.parent.mkdir(exist_ok=True)
    for name, data in sets.items():
        watch.on_stage(f"reading {data}")
        problems = Problems(job.on_bad_row)
        unread: Counter[str] = Counter()
        rows = _counted(read_rows(data), unread, preferences=job.objective == "dpo")
        packed = write_packed(
            encode_rows(rows, encoder, problems, num_workers=job.num_workers),
            run.rows(name),
            sequence_length=job.sequence_length,
            pack=job.pack and job.objective == "sft",
            pad=pad,
            source=data,
        )
        if problems.count:
            watch.on_stage(
                f"{problems.count} rows of {data} were left out; {run.data.name} names them, "
                f"first {problems.named[0]}"
            )
        others = [str(path) for path in other_files(Path(data))]
        if others:
            watch.on_stage(f"{len(others)} files of {data} are no rows, first {others[0]}")
        if unread:
            watch.on_stage(f"{data} has fields that are not read: {', '.join(unread)}")
        facts[name] = {
            "path": data,
            "unread_fields": unread,
            "unread_files": others[:_NAMED_FILES],
            "files": file_hashes(data),
            **asdict(packed),
            "left_out": problems.count,
            "left_out_rows": problems.named,
        }
    write_json(run.data, facts)


def _counted(
    rows: Iterable[Row | Problem], unread: Counter[str], *, preferences: bool
) -> Iterator[Row | Problem]:
    """Pass rows on, and count what of them is not read, by field."""
    for row in rows:
        if isinstance(row, Row):
            unread.update(unread_fields(row, preferences=preferences))
        yield row


def record_base(job: TuningJob, model_folder: Path, run: RunFolder) -> None:
    """Write down which weights the run begins with.

    Raises CheckpointError if it has begun with others.
    """
    files = model_hashes(model_folder)
    if job.adapter:
        files |= model_hashes(adapter_folder(Path(job.adapter)))
    if not run.base_model.exists():
        write_json(run.base_model, files)
        return
    before = read_json_object(run.base_model)
    changed = sorted(name for name in before | files if before.get(name) != files.get(name))
    if changed:
        raise CheckpointError(
            f"{changed[0]} is not what {run.path} began with. Bring it back, or start a new run."
        )


def name_of(path: str) -> str:
    """What an evaluation set is called in the metrics: its file name without the ending."""
    return Path(path).stem


def _encoder(job: TuningJob, model_folder: Path, run: RunFolder) -> tuple[Encoder, int]:
    tokenizer = load_tokenizer(run.tokenizer)
    ends = end_tokens(run.tokenizer)
    num_known = load_config(model_folder).vocab_size
    if (num_tokens := tokenizer.get_vocab_size()) > num_known:
        raise CheckpointError(
            f"the tokenizer in {model_folder} has {num_tokens} tokens, the model {num_known}: "
            "they do not belong together."
        )
    if not ends:
        raise CheckpointError(f"{job.model} names no token that ends a text (eos_token).")
    chat = ChatEncoder(
        tokenizer=tokenizer,
        template=_template(run.tokenizer, job.template),
        end_of_text=ends[0],
        max_tokens=job.sequence_length + 1,
        special=special_tokens(tokenizer),
    )
    return (PreferenceEncoder(chat) if job.objective == "dpo" else chat), ends[0]


def _template(folder: Path, name: str) -> ChatTemplate | None:
    """None leaves it to the rows whether one is needed."""
    try:
        return choose_chat_template(folder, name)
    except ModelError:
        if name:
            raise
        return None


def _copy_tokenizer(job: TuningJob, model_folder: Path, run: RunFolder) -> None:
    """Take the tokenizer along; a template that was named becomes the model's own."""
    load_tokenizer(model_folder)
    run.tokenizer.mkdir(exist_ok=True)
    for name in _TOKENIZER_FILES:
        if (model_folder / name).is_file():
            shutil.copyfile(model_folder / name, run.tokenizer / name)
    if job.template:
        source = choose_chat_template(model_folder, job.template).source
        write_text(run.tokenizer / "chat_template.jinja", source)
