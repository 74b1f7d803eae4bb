"""Tools for every package: errors, records, command lines, files, ranks, hardware, progress.

checksummed.py  JSON with tensors beside it, in files that are known to be whole and unaltered when they are read.
command.py      Error handling of every command: one line on stderr and an exit code.
command_line.py Words of a command line, taken apart by click, as fields of records.
distributed.py  Several processes as one run, where `torchrun` started them.
errors.py       Errors a user can act on: one line that says what is wrong and what to do.
files.py        The user's cache folder, and files that are either whole or absent, and known to be what was written.
hardware.py     The faster matmul dtype of this machine, and products whose bits do not depend on the cores.
progress.py     Messages of a working command: lines, a progress bar, and the time that its stages take.
record.py       Frozen records that pydantic reads and checks: configurations, and the options of commands.
safe_read.py    Reading what was written before: files that may be damaged, cut or hostile.
"""
