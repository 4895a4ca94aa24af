"""Repositories of models on Hugging Face's hub."""

import os

from huggingface_hub import HfApi, try_to_load_from_cache

PATIENCE = 10  # seconds to wait for an answer


def check_reachable(argument: str, source: str | os.PathLike, file: str) -> None:
    """Refuses a repository that is neither kept on this machine nor reached: a download would try again and again.

    Args:
        argument: that names it, for the message. source: a folder, which is not looked at, or a repository.
        file: that every such repository has, such as model_index.json.

    Raises:
        OSError: it cannot be reached, or there is none of that name.
    """
    if os.path.isdir(source) or isinstance(try_to_load_from_cache(str(source), file), str):
        return
    try:
        HfApi().model_info(str(source), timeout=PATIENCE)
    except Exception as error:  # of whichever HTTP library huggingface_hub is built on; some have no message
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OSError(f"{argument}: there is no folder {source}, and the repository {source} cannot be reached: "
                      f"{why}") from None
