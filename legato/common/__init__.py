"""What every package uses: errors, records, command lines, files, ranks, hardware, progress.

checksummed.py  JSON with tensors beside it, in files that are known to be whole and unaltered when they are
                read.
command.py      What every command of Legato does with an error: one line on stderr and an exit code.
command_line.py The words of a command line, taken apart by click, become the fields of records.
distributed.py  Several processes as one run, where `torchrun` started them.
errors.py       Errors a user can act on: one line that says what is wrong and what to do.
files.py        The user's cache folder, and files that are either whole or absent, and known to be what was
                written.
hardware.py     What this machine is good at, decided by measuring; and products whose bits do not depend on how
                many cores it has.
progress.py     What a command says while it works: lines, and a bar of progress.
record.py       Frozen records that pydantic reads and checks: configurations, and the options of commands.
safe_read.py    Reading what was written before: files may be damaged, cut or hostile, and are bounded in size
                and depth.
"""
