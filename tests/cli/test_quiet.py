"""What libraries say to their own developers is not printed; errors are."""

import logging
import warnings

import pytest

from scale.cli.quiet import quiet_libraries


@pytest.mark.parametrize("name", ["DeepSpeed", "transformers.modeling_utils", "bitsandbytes.backends.cpu.ops", "peft"])
def test_errors_of_libraries_are_printed_and_nothing_below(name, capsys):
    quiet_libraries()
    logger = logging.getLogger(name)
    handler = logging.StreamHandler()  # what libraries add, with a level of their own
    logger.addHandler(handler)
    own = logger.level
    logger.setLevel(logging.WARNING) if "." not in name else None
    try:
        logger.warning("accelerator not found")
        logger.error("weights not found")
    finally:
        logger.removeHandler(handler)
        logger.setLevel(own)
    said = capsys.readouterr().err
    assert "weights not found" in said and "accelerator" not in said


def test_warnings_of_libraries_are_dropped_and_those_of_torch_and_our_own_stay():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quiet_libraries()
        warnings.warn_explicit("tied", UserWarning, "layer.py", 1, module="peft.tuners.lora.layer")
        warnings.warn_explicit("will go", FutureWarning, "any.py", 1, module="scale.models.build")
        warnings.warn_explicit("this GPU is not supported", UserWarning, "cuda.py", 1, module="torch.cuda")
        warnings.warn_explicit("ours", UserWarning, "build.py", 1, module="scale.models.build")
    assert [str(w.message) for w in caught] == ["this GPU is not supported", "ours"]
