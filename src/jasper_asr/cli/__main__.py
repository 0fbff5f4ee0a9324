"""python -m jasper_asr.cli"""

from jasper_asr.cli import main

main()
