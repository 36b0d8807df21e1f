#!/usr/bin/env bash
# Prints the path of Debian's chromium; as root it installs it with apt-get if there is none.
# Where there can be none it says why and ends with code 77.
set -euo pipefail

find_it() { command -v chromium || command -v chromium-browser; }
give_up() { printf '%s\n' "$1" >&2; exit 77; }

find_it && exit 0
[[ $(id -u) -eq 0 ]] || give_up "there is no chromium, and only root can install it"
command -v apt-get >/dev/null || give_up "there is no chromium, and no apt-get to install it with"
export DEBIAN_FRONTEND=noninteractive
{
    apt-get install -y --no-install-recommends chromium ||
        { apt-get update && apt-get install -y --no-install-recommends chromium; }
} >/dev/null 2>&1 || give_up "apt-get cannot install chromium"
find_it || give_up "apt-get has installed no chromium"
