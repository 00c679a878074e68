#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Unpacks Intel's offline GPU compiler from Debian's unstable suite into a folder, and installs nothing. The packages bring the C
# library that they need, so that this works on a stable Debian.
# Usage: unpack_ocloc.sh FOLDER    afterwards FOLDER/ocloc runs it
set -euo pipefail
mkdir -p "${1:?usage: unpack_ocloc.sh FOLDER}"
folder=$(cd "$1" && pwd)
mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | grep -v security | head -1)
mkdir -p "$folder"/{lists/partial,cache/archives/partial,packages,unpacked}
echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror sid main" > "$folder/sid.list"
options=(-o "Dir::Etc::sourcelist=$folder/sid.list" -o Dir::Etc::sourceparts=/dev/null -o "Dir::State::Lists=$folder/lists"
  -o "Dir::Cache=$folder/cache" -o APT::Sandbox::User=root)
apt-get "${options[@]}" update -qq
(cd "$folder/packages" && apt-get "${options[@]}" download -qq \
  intel-ocloc libigc2 libigdfcl2 libc6 libgcc-s1 libstdc++6 zlib1g)
for package in "$folder"/packages/*.deb; do dpkg -x "$package" "$folder/unpacked"; done
libraries=$folder/unpacked/usr/lib/x86_64-linux-gnu
cat > "$folder/ocloc" << WRAPPER
#!/bin/sh
exec "$libraries/ld-linux-x86-64.so.2" --library-path "$libraries" "$(ls "$folder"/unpacked/usr/bin/ocloc-*)" "\$@"
WRAPPER
chmod +x "$folder/ocloc"
