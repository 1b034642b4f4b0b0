"""Makes damage.py, which tests of several rooms share, importable by name."""

import importlib.util
import sys
from pathlib import Path

spec = importlib.util.spec_from_file_location("damage", Path(__file__).with_name("damage.py"))
sys.modules["damage"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["damage"])
