#!/usr/bin/env bash
# Debian packages that some tests use: Chromium (dashboard) and bubblewrap (running generated code). Installed where
# that is allowed; otherwise said, and those tests skip by name. Never fails.
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 0

packages=()
command -v chromium >/dev/null || packages+=(chromium fonts-liberation)
command -v bwrap >/dev/null || packages+=(bubblewrap)
[ ${#packages[@]} -gt 0 ] || exit 0

if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  echo "not installed: ${packages[*]} (needs root and apt-get); the tests that use them are skipped"
  exit 0
fi
mkdir -p .cache
export DEBIAN_FRONTEND=noninteractive
install() { timeout 120 apt-get update -qq && timeout 400 apt-get install -y -qq --no-install-recommends "${packages[@]}"; }
if ! install </dev/null >.cache/apt.log 2>&1; then
  echo "could not be installed: ${packages[*]} (see .cache/apt.log); the tests that use them are skipped"
fi
exit 0
