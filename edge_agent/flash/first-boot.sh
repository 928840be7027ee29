#!/bin/sh
# The device's own part of a first boot. Needs no cloud-init: whatever sets the system up runs this, our image's service too,
# and it may run again at any time. It moves the enrolment bundle off the readable partition, wipes what is secret there, and
# starts the agent. What it did stands in applied.txt beside it.
set -u
here=$(cd "$(dirname "$0")" && pwd)
boot=$(dirname "$here")
state=${MOBILLM_STATE_DIRECTORY:-/var/lib/mobillm-fleet}
configuration=${MOBILLM_CONFIGURATION_DIRECTORY:-/etc/mobillm-fleet}

wipe() {
  [ -f "$1" ] || return 0
  dd if=/dev/zero of="$1" bs=1 count="$(wc -c < "$1")" conv=notrunc 2>/dev/null
  sync
  rm -f "$1"
}

# The power went during `wipe`: what was in the file had been copied before, and must not be copied again.
half_wiped() { [ "$(tr -d '\0' < "$1" | wc -c)" -ne "$(wc -c < "$1")" ]; }

note() { echo "$(date -u +%Y-%m-%dT%H:%M:%SZ) $*" >> "$here/applied.txt"; sync; }

mkdir -p "$state" "$configuration" && chmod 700 "$state"
if [ -f "$here/agent.toml" ] && ! cmp -s "$here/agent.toml" "$configuration/agent.toml"; then
  cp "$here/agent.toml" "$configuration/agent.toml" && note "settings copied to $configuration"
fi
if [ -f "$here/device.bundle" ] && ! half_wiped "$here/device.bundle"; then
  # Whole and on the disk before the only other copy goes.
  (umask 077 && cp "$here/device.bundle" "$state/device.bundle.new") && sync &&
    cmp -s "$here/device.bundle" "$state/device.bundle.new" && mv "$state/device.bundle.new" "$state/device.bundle" && sync || {
    note "the bundle could not be copied to $state"
    exit 1
  }
  id mobillm-fleet >/dev/null 2>&1 && chown -R mobillm-fleet: "$state"
  note "bundle copied to $state"
fi

if [ -d "$here/backbone" ]; then
  # Whole and on the disk before it takes its place; the agent checks it by its hash, and fetches it where this fails.
  if [ -e "$state/backbone" ]; then
    rm -rf "$here/backbone" && note "there is a backbone already, the card's was removed"
  elif rm -rf "$state/backbone.new" && cp -r "$here/backbone" "$state/backbone.new" && sync &&
    diff -r "$here/backbone" "$state/backbone.new" >/dev/null && chmod -R go= "$state/backbone.new" &&
    mv "$state/backbone.new" "$state/backbone" && sync; then
    id mobillm-fleet >/dev/null 2>&1 && chown -R mobillm-fleet: "$state"
    rm -rf "$here/backbone"
    note "backbone moved to $state"
  else
    rm -rf "$state/backbone.new"
    note "the backbone could not be copied to $state: the agent fetches it"
  fi
fi

# cloud-init and rpi-preseed have read theirs by now, and keep what they need elsewhere.
for file in user-data network-config rpi-preseed.toml; do
  [ -f "$boot/$file" ] || continue
  case $file in
    user-data) wipe "$boot/$file" && printf '#cloud-config\n' > "$boot/$file" ;;
    *) wipe "$boot/$file" ;;
  esac
  note "wiped $file"
done
# Last: while it is there, our image's service comes here again after an interruption, and the rest is wiped too.
if [ -f "$here/device.bundle" ]; then
  wipe "$here/device.bundle"
  note "wiped device.bundle"
fi

# For the agent's report of this first boot (edge_agent/first_steps.py). As seconds into it: the date may still be of 1970.
if [ -f "$here/flashed.json" ] && ! cmp -s "$here/flashed.json" "$state/flashed.json"; then
  # Not cp: it would keep the mode of a FAT partition that only root may read, and the agent is not root.
  (umask 022 && cat "$here/flashed.json" > "$state/flashed.json")
fi
[ -s "$state/first-boot" ] || echo "$(cat /proc/sys/kernel/random/boot_id) $(cut -d ' ' -f 1 /proc/uptime)" > "$state/first-boot"

if command -v systemctl >/dev/null && systemctl cat mobillm-edge-agent.service >/dev/null 2>&1; then
  systemctl enable --now mobillm-edge-agent.service >/dev/null 2>&1 && note "agent started" || note "agent could not be started"
else
  note "no agent on this image yet: install it (docs), the bundle waits in $state"
fi
