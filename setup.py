"""Builds what is not Python: the extension `jobworker._fastio`, and the program `jobinit`.

jobinit is no module but a static executable, and yet built by `build_ext`: so wheel, source
distribution and editable install all get it, in `jobworker/_bin`, with its run bit, and the
wheel is one for this platform.
"""

from __future__ import annotations

from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

JOBINIT = "jobworker._bin.jobinit"


class BuildNative(build_ext):
    """build_ext that makes an executable of the one Extension that stands for jobinit."""

    def initialize_options(self) -> None:
        super().initialize_options()
        self.cython_c_in_temp = True  # no generated C beside the sources

    def build_extension(self, ext: Extension) -> None:
        if ext.name == JOBINIT:
            self._build_executable(ext)
        else:
            super().build_extension(ext)

    def get_ext_filename(self, fullname: str) -> str:
        # Also called with the bare last part, for builds in place.
        if fullname in {JOBINIT, JOBINIT.rpartition(".")[2]}:
            return str(Path(*fullname.split(".")))
        return super().get_ext_filename(fullname)

    def copy_extensions_to_source(self) -> None:
        Path("jobworker/_bin").mkdir(exist_ok=True)
        super().copy_extensions_to_source()

    def _build_executable(self, ext: Extension) -> None:
        objects = self.compiler.compile(
            ext.sources,
            output_dir=self.build_temp,
            extra_postargs=ext.extra_compile_args,
            depends=ext.depends,
        )
        target = Path(self.get_ext_fullpath(ext.name))
        self.compiler.link_executable(
            objects,
            target.name,
            output_dir=str(target.parent),
            extra_postargs=ext.extra_link_args,
        )


setup(
    cmdclass={"build_ext": BuildNative},
    ext_modules=[
        Extension(
            "jobworker._fastio",
            ["jobworker/_fastio.pyx"],
            extra_compile_args=["-O2", "-pthread"],
            extra_link_args=["-pthread"],
        ),
        Extension(
            JOBINIT,
            ["jobinit.c"],
            depends=[str(part) for part in Path("jobinit").glob("*.h")],
            extra_compile_args=["-O2", "-Wall", "-Wextra", "-Werror"],
            extra_link_args=["-static"],
        ),
    ],
)
