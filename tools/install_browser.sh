#!/bin/sh
# Install Chromium for the accessibility checks, unless a browser that they can use is there.
set -eu
for name in chromium chromium-browser google-chrome google-chrome-stable; do
    if command -v "$name" >/dev/null 2>&1; then
        echo "the browser is $(command -v "$name")"
        exit 0
    fi
done
if [ -d "/Applications/Google Chrome.app" ] || [ -d "/Applications/Chromium.app" ]; then
    echo "the browser is in /Applications"
    exit 0
fi
if ! command -v apt-get >/dev/null 2>&1; then
    echo "Install Chromium or Google Chrome with your system's package manager, then run make test again." >&2
    exit 1
fi
if [ "$(id -u)" -eq 0 ]; then
    sudo=
elif command -v sudo >/dev/null 2>&1; then
    sudo=sudo
else
    echo "As root run: apt-get install --no-install-recommends chromium" >&2
    exit 1
fi
export DEBIAN_FRONTEND=noninteractive
$sudo apt-get update -q </dev/null
$sudo apt-get install -q -y --no-install-recommends chromium </dev/null
