"""The pack for a machine with a GPU: what is in it works there."""

import os
import stat
import zipfile

import gpu_pack


def test_a_packed_program_may_be_run(tmp_path):
    wheel, program = tmp_path / "made-1-py3-none-any.whl", zipfile.ZipInfo("made/program")
    program.external_attr = (stat.S_IFREG | 0o755) << 16
    info = {"WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"}
    info |= {"METADATA": "Metadata-Version: 2.1\nName: made\nVersion: 1\n", "RECORD": ""}
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(program, "#!/bin/sh\n")
        for name, text in info.items():
            archive.writestr(f"made-1.dist-info/{name}", text)
    gpu_pack.install([str(wheel)], tmp_path / "site")
    assert os.access(tmp_path / "site/made/program", os.X_OK)
