"""An adapter for the tiny world's model, the chat server of tests/extras/judges, GGUF files."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

import lora
from model import load_model

HERE = Path(__file__).parent
for place in (HERE.parent / "extras/judges/chatserver.py", HERE / "gguf_files.py"):
    spec = importlib.util.spec_from_file_location(place.stem, place)
    sys.modules[place.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[place.stem])


@pytest.fixture(scope="module")
def adapter(world, tmp_path_factory):
    """An adapter that changes what the tiny world's model says."""
    path = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(1)
    model = lora.apply_lora(load_model(world / "model"), lora.LoraConfig(rank=4))
    for module in lora.lora_modules(model).values():
        module.lora_B.data.normal_(0, 1.0)
    lora.save_adapter(model, path, str(world / "model"))
    return path


@pytest.fixture
def questions(world):
    """Flags for the tiny world's model and questions."""
    return ["--model", str(world / "model"), "--tasks", str(world / "tasks"), "--paraphrases",
            str(world / "paraphrases.json"), "--per-task", "3", "--max-new-tokens", "4"]
