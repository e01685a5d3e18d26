"""A whole model as its own base."""

from pathlib import Path
from typing import Any

from hftl.errors import message_line
from hftl.model.sizes import absurd
from hftl.model.source import SourceModel
from hftl.publish.doctor.finding import Finding, defect
from hftl.publish.doctor.fit import CANNOT
from hftl.publish.doctor.patient import CONFIG, Patient


def whole_model(patient: Patient) -> SourceModel | Finding:
    """The model, or why nobody can load it: its config.json is of none.

    Raises:
        RecipeError: if its config is of an architecture that hftl does not know.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    from hftl.model.anatomy import anatomy_of

    kind = patient.config.get("model_type")
    if not isinstance(kind, str):
        # transformers would go by the folder's name.
        return _of_no_model(f"its model_type is {kind!r}, expected a name")
    why = absurd(patient.config)
    if why is not None:
        return _of_no_model(why)
    folder = Path(patient.folder)
    try:
        config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (*CANNOT, OSError, StrictDataclassError) as error:
        return _of_no_model(message_line(error))
    anatomy_of(config)
    return SourceModel(str(folder), folder, None, None, True, config, config.model_type)


def _of_no_model(why: str) -> Finding:
    return defect("config", f"is of no model: {why}", CONFIG, "Save it again, or fetch it again")
