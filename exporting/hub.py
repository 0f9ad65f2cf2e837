"""Upload a run to the Hugging Face hub: weights, config.json and a model card, in one commit."""

from contextlib import contextmanager
from pathlib import Path

from engine.command_line import chain
from engine.runs import HUB_ID
from exporting.model_card import Card
from exporting.paths import without_folders, without_paths
from imaging import files
from prediction.models import Weights, load_model


def push(weights: Weights, second: dict, args) -> int:
    """Upload the run in --weights to the repository --push-to-hub. Return the exit status.

    Raises ValueError or OSError, one line, for weights that are no run, without a token, and for
    what the hub refuses.
    """
    repository = args.push_to_hub
    folder = run_folder(weights)
    if second:
        raise ValueError(f"--{next(iter(second))}: a run is uploaded as it is; remove it")
    check_access(repository)

    # Refuse a damaged run before anything is sent: nobody could load it.
    loaded = load_model(weights, "cpu")
    card = Card(weights, loaded.model, folder, repository)
    config = public_config(weights.run, repository)
    contents = {"model.safetensors": folder / "best.safetensors", **loaded.recipe.files}
    contents["config.json"] = files.json_text(config).encode()
    contents["README.md"] = card_text(card).encode()

    upload(repository, contents, card, args.private)
    return 0


def run_folder(weights: Weights) -> Path:
    """Return the folder of the run to upload. Raises ValueError, one line, if it is none."""
    path = Path(weights.source)
    folder = path.parent if path.is_file() else path
    if not weights.run or not folder.is_dir():
        raise ValueError(
            f"{weights.source}: is not a run folder; --push-to-hub uploads your own runs, and "
            "official weights are on the hub already"
        )
    if not (folder / "best.safetensors").is_file():
        raise ValueError(
            f"{folder}: has no best.safetensors, which the first validation writes; train on with "
            f"python train.py --resume --out {folder}"
        )
    return folder


def card_text(card: Card) -> str:
    """Return the text of a model card. Raises ValueError, one line, for files of a damaged run."""
    try:
        return card.text()
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        reason = " ".join(repr(error).split())
        raise ValueError(
            f"{card.folder}: test/ or metrics.csv are not as train.py wrote them ({reason:.150}); "
            "restore them"
        ) from None


def check_access(repository: str) -> None:
    """Raise ValueError, one line, if a repository is not named OWNER/NAME or without a token."""
    from huggingface_hub import constants, get_token

    if not HUB_ID.fullmatch(repository):
        raise ValueError(f"--push-to-hub {repository}: must be OWNER/NAME")
    if get_token() is None:
        raise ValueError(
            "--push-to-hub: needs a token with write permission from "
            f"{constants.ENDPOINT}/settings/tokens; log in with `hf auth login`, or set "
            "HF_TOKEN"
        )


def public_config(run: dict, repository: str) -> dict:
    """Return a run's config.json with names instead of paths, as it is uploaded."""
    public = run | {"options": without_paths(run.get("options", {}))}
    if run.get("decoder"):
        public["decoder"] = without_folders(run["decoder"])
    if run.get("config", {}).get("vocabulary"):  # vocab.txt of BiomedCLIPSeg, which is uploaded
        public["config"] = run["config"] | {"vocabulary": repository}
    return public


# --- the hub --------------------------------------------------------------------------------------


def upload(repository: str, contents: dict[str, Path | bytes], card: Card, private: bool) -> None:
    """Print what is uploaded, then create the repository if it is new, and commit all files.

    contents: name in the repository -> file or content.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, constants

    api = HfApi()
    address = f"{constants.ENDPOINT}/{repository}"
    with upload_errors(repository):
        is_private = find_repository(api, repository)
    if private and is_private is False:
        raise ValueError(
            f"{repository}: exists and is public, which --private does not change; make it private "
            f"at {address}/settings, or choose another name"
        )

    is_new = is_private is None
    visibility = "private" if private or is_private else "public"
    kind = "new" if is_new else "exists; files of these names are replaced in a new commit"
    print(f"uploading to {address} ({visibility}, {kind}):")

    operations = []
    for name, content in contents.items():
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        print(f"  {name:20} {size:>13,} bytes")
        operations.append(CommitOperationAdd(name, content))

    cases = dict.fromkeys(row["name"] for row in card.worst_cases)
    if cases:
        print(f"  README.md names the worst test cases: {', '.join(cases)}", flush=True)

    with upload_errors(repository):
        if is_new:
            api.create_repo(repository, private=private)
        commit = api.create_commit(
            repository, operations, commit_message=f"Upload a run of {card.weights.name}"
        )
    print(f"uploaded: {commit.commit_url}")


def find_repository(api, repository: str) -> bool | None:
    """Return True if a repository is private, False if it is public, None if there is none."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return bool(api.repo_info(repository).private)
    except RepositoryNotFoundError:
        return None


@contextmanager
def upload_errors(repository: str):
    """Turn the errors of huggingface_hub in a block into an OSError of one line."""
    from huggingface_hub import constants
    from huggingface_hub.utils import tqdm

    try:
        yield
    except Exception as error:  # its class depends on the version of huggingface_hub
        for bar in [*getattr(tqdm, "_instances", ())]:  # the client leaves them open
            bar.close()
        statuses = []
        for cause in chain(error):
            statuses.append(getattr(getattr(cause, "response", None), "status_code", None))
        if 401 in statuses:
            message = "the hub refuses the token; log in with `hf auth login`, or correct HF_TOKEN"
        elif 403 in statuses:
            message = (
                "the token may not write there; make one with write permission at "
                f"{constants.ENDPOINT}/settings/tokens, or choose a repository of yours"
            )
        else:
            lines = str(chain(error)[-1]).strip().splitlines() or [repr(error)]
            message = (
                f"could not be uploaded to {constants.ENDPOINT} ({lines[0]}); run the same command "
                "again"
            )
        raise OSError(f"{repository}: {message}") from None
