"""The metadata of an artifact as parameters of a served model, in Triton's configuration and in `cloudrt serve`.

`cloudrt.artifact` is the result of `Artifact.to_dict` as JSON; `cloudrt.sha256` is the SHA-256 of the artifact's file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from cloudrt.errors import ArtifactError
from cloudrt.model.artifact import Artifact

ARTIFACT, DIGEST, RULES, CLASSES = "cloudrt.artifact", "cloudrt.sha256", "cloudrt.rules", "cloudrt.classes"


def model_parameters(artifact: Artifact, digest: str) -> dict[str, str]:
    """Return the parameters of a served artifact; `digest` is the SHA-256 of its file."""
    classes = artifact.labels.classes
    rules = {label: rule.to_dict() for label, rule in zip(classes, artifact.rules, strict=False)}
    return {
        RULES: json.dumps(rules),
        CLASSES: ",".join(classes),
        ARTIFACT: json.dumps(artifact.to_dict()),
        DIGEST: digest,
    }


def read_parameters(parameters: Mapping[str, str], where: str) -> tuple[Artifact, str]:
    """Return the artifact that a server's parameters describe, and the SHA-256 of its file or "" if it is not given.

    Parameters
    ----------
    parameters
        Parameters of the model on the server: key -> value.
    where
        The model and the server, for error messages.

    Raises
    ------
    ArtifactError
        The parameters are missing or malformed.
    """
    if ARTIFACT not in parameters:
        raise ArtifactError(
            f"{where} has no metadata of cloudrt: serve it with cloudrt serve or cloudrt-export --triton, or name "
            "the artifact with `rules`"
        )
    try:
        return Artifact.from_dict(json.loads(parameters[ARTIFACT])), parameters.get(DIGEST, "")
    except (ValueError, AttributeError, TypeError, OverflowError, RecursionError) as error:  # DataError is a ValueError
        raise ArtifactError(f"{where}: malformed metadata: {' '.join(str(error).split())[:300]}") from error
