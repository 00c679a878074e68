# SPDX-License-Identifier: Apache-2.0
"""Plug-ins for other projects. Nothing here is imported by `import xpu_fp4`."""
