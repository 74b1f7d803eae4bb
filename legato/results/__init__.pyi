from .run_dir import RunDir
from .saved_run import SavedRun

__all__ = ["RunDir", "SavedRun"]
