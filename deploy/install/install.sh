#!/bin/sh
# Installs drover, brings an installed one up to date, or removes it.
#
#   sh install.sh                                   from the unpacked archive that it lies in
#   curl -fsSL URL/install.sh | sh -s -- --archive URL/drover-VERSION-x86_64-unknown-linux-musl.tar.gz
#   sh install.sh --uninstall
#
#   --archive FILE|URL   the archive; beside it lies FILE.sha256
#   --prefix DIR         where to [/usr for root, else ~/.local]
#   --uninstall          removes every file that was installed; state and configuration stay
#   --purge              with --uninstall: those too, with every swarm and event
#
# The variables DROVER_ARCHIVE and DROVER_PREFIX do what the flags do.
set -eu

main() {
  archive=${DROVER_ARCHIVE:-} prefix=${DROVER_PREFIX:-} uninstall='' purge=''
  while [ $# -gt 0 ]; do
    case $1 in
      --archive) archive=${2:?--archive needs a file or an address} && shift ;;
      --prefix) prefix=${2:?--prefix needs a directory} && shift ;;
      --uninstall) uninstall=1 ;;
      --purge) purge=1 ;;
      -h | --help) usage && return 0 ;;
      *) usage >&2 && fail "what is $1?" ;;
    esac
    shift
  done
  [ -z "$purge" ] || [ -n "$uninstall" ] || fail "--purge goes with --uninstall"
  PATH=${PATH:-/usr/local/bin:/usr/bin:/bin}
  root=''
  [ "$(id -u)" != 0 ] || root=1
  if [ -z "$prefix" ] && [ -n "$uninstall" ] && [ -f "$0" ]; then
    # The copy that lies beside what it has installed, wherever that is.
    here=$(cd "$(dirname -- "$0")" && pwd)
    case $here in
      */share/drover) [ ! -f "$here/manifest" ] || prefix=${here%/share/drover} ;;
    esac
  fi
  if [ -z "$prefix" ]; then
    if [ -n "$root" ]; then prefix=/usr; else prefix=${HOME:?is not set, so give --prefix}/.local; fi
  fi
  case $prefix in
    /*) ;;
    *) prefix=$(pwd)/$prefix ;;
  esac
  prefix=${prefix%/}
  # It stands in units, in commands that are shown, and in a list of lines.
  case $prefix in
    *[\"\'\\\`\$%\&\|]* | *[[:cntrl:]]*) fail "--prefix $prefix: no quotes, line breaks or any of \\ \` \$ % & |" ;;
  esac
  # Where systemd and login shells look for what belongs to the whole machine.
  system_wide=''
  case $prefix in
    /usr | /usr/local) system_wide=$root ;;
  esac
  manifest=$prefix/share/drover/manifest
  if [ -n "$uninstall" ]; then remove; else install_all; fi
}

usage() {
  cat <<'END'
install.sh [--archive FILE|URL] [--prefix DIR]
install.sh --uninstall [--purge] [--prefix DIR]
END
}

fail() {
  echo "install.sh: $*" >&2
  exit 1
}

say() { echo "$*"; }

# --- installing

install_all() {
  tmp=$(mktemp -d) begun=''
  trap 'rm -rf "$tmp"; [ -z "$begun" ] || say "broken off: run it again, or with --uninstall" >&2' EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM
  here=$(dirname -- "$0")
  if [ -n "$archive" ]; then
    fetch
  elif [ -f "$0" ] && [ -f "$here/SHA256SUMS" ] && [ -d "$here/bin" ]; then
    source=$here
  else
    fail "no archive: give --archive FILE or --archive URL"
  fi
  (cd "$source" && sha256sum --check --quiet --strict SHA256SUMS) || fail "the archive is damaged: its checksums are not right"
  # Nothing is touched before it is known to run here.
  version=$("$source/bin/drover" --version) ||
    fail "$source/bin/drover does not run here ($(uname -m), Linux $(uname -r)); where $tmp may hold no programs, set TMPDIR"

  (cd "$source" && find . -type f ! -name SHA256SUMS; cd "$source" && find . -type l) | sed 's|^\./||' | LC_ALL=C sort >"$tmp/list"
  while IFS= read -r file; do
    to=$(target "$file")
    [ -z "$to" ] || echo "file $to"
  done <"$tmp/list" >"$tmp/files"
  word=installed
  : >"$tmp/before"
  if [ -f "$manifest" ]; then
    cp -- "$manifest" "$tmp/before"
    word=updated
  fi
  # What somebody else put there is neither replaced now nor removed one day.
  while IFS= read -r line; do
    to=${line#file }
    if [ -e "$to" ] || [ -L "$to" ]; then
      grep -qxF -e "$line" "$tmp/before" ||
        fail "$to is there and was not put there by this script: remove it (apt remove drover, where it is of that package), or give another --prefix"
    fi
  done <"$tmp/files"

  # The list first: what is interrupted can be begun again, and removed. What an earlier run made stays in it.
  grep '^dir ' "$tmp/before" >"$tmp/dirs" || true
  make_dir "$prefix/share/drover"
  sort -u "$tmp/dirs" "$tmp/before" "$tmp/files" >"$manifest.new"
  mv "$manifest.new" "$manifest"
  begun=1
  while IFS= read -r file; do
    place "$file"
  done <"$tmp/list"
  if [ -n "$system_wide" ]; then
    # What the unit of the dispatcher hands over as credentials.
    make_dir /etc/drover/keys
    chmod 700 /etc/drover/keys
  fi
  # What the version before had and this one has not.
  sed -n 's/^file //p' "$tmp/before" | while IFS= read -r old; do
    grep -qxF -e "file $old" "$tmp/files" || rm -f -- "$old"
  done
  LC_ALL=C sort -u "$tmp/dirs" | cat - "$tmp/files" >"$manifest.new"
  mv "$manifest.new" "$manifest"
  begun=''
  reload
  say "$version is $word in $prefix"
  case ":$PATH:" in
    *":$prefix/bin:"*) ;;
    *) say "add it to your PATH:  export PATH=\"$prefix/bin:\$PATH\"" ;;
  esac
  [ "$word" = installed ] || say "daemons that run go on as they are until they are started again: drover down, or systemctl restart"
  case $prefix in
    *[!A-Za-z0-9/._+@-]*) say "remove it with:  sh '$prefix/share/drover/install.sh' --uninstall" ;;
    *) say "remove it with:  sh $prefix/share/drover/install.sh --uninstall" ;;
  esac
}

fetch() {
  name=$(basename -- "$archive")
  for part in "" .sha256; do
    case $archive in
      file://*) from=${archive#file://}$part ;;
      *://*) from='' ;;
      *) from=$archive$part ;;
    esac
    if [ -n "$from" ] && [ -f "$from" ]; then
      cp -- "$from" "$tmp/$name$part" || fail "cannot read $from"
      continue
    fi
    case $archive in
      *://*) ;;
      *) fail "there is no $from" ;;
    esac
    if command -v curl >/dev/null; then
      curl -fsSL --retry 3 -o "$tmp/$name$part" "$archive$part" || fail "cannot fetch $archive$part"
    elif [ -n "$from" ]; then
      fail "there is no $from"
    elif command -v wget >/dev/null; then
      wget -q -O "$tmp/$name$part" "$archive$part" || fail "cannot fetch $archive$part"
    else
      fail "neither curl nor wget is here: fetch the archive yourself and give --archive FILE"
    fi
  done
  # Whatever name it was given on its way.
  wanted='' have=$(sha256sum <"$tmp/$name")
  read -r wanted _ <"$tmp/$name.sha256" || true
  [ "$wanted" = "${have%% *}" ] || fail "$archive is damaged: its checksum is not right"
  mkdir "$tmp/unpacked"
  tar -xzf "$tmp/$name" -C "$tmp/unpacked" --no-same-owner || fail "$archive cannot be unpacked"
  source=$(find "$tmp/unpacked" -mindepth 1 -maxdepth 1 -type d)
  [ -f "$source/SHA256SUMS" ] || fail "$archive holds no drover"
}

# Where a file of the archive goes; nothing for what is not for this kind of installation.
target() {
  case $1 in
    install.sh) echo "$prefix/share/drover/install.sh" ;;
    sbom.cdx.json) echo "$prefix/share/doc/drover/sbom.cdx.json" ;;
    lib/systemd/system/*) [ -z "$root" ] || echo "$prefix/$1" ;;
    lib/systemd/user/*)
      if [ -n "$root" ]; then echo "$prefix/$1"; else echo "$prefix/share/systemd/user/${1##*/}"; fi
      ;;
    etc/*) [ -z "$system_wide" ] || echo "/$1" ;;
    bin/* | share/*) echo "$prefix/$1" ;;
  esac
}

place() {
  to=$(target "$1")
  [ -n "$to" ] || return 0
  make_dir "$(dirname -- "$to")"
  # Put in place whole, so that a program which runs keeps its own file and nobody reads half of one.
  fresh=$to.drover-new
  rm -f -- "$fresh"
  if [ -L "$source/$1" ]; then
    cp -P -- "$source/$1" "$fresh"
  else
    case $1 in
      lib/systemd/*) unit "$source/$1" >"$fresh" ;;
      *) cp -- "$source/$1" "$fresh" ;;
    esac
    if [ -x "$source/$1" ]; then chmod 755 "$fresh"; else chmod 644 "$fresh"; fi
  fi
  mv -f -- "$fresh" "$to"
}

# A unit with this prefix in it. A path with spaces is quoted where it is a command, and has none where it is an address.
unit() {
  quote='' address=$(echo "$prefix" | sed 's/ /%%20/g')
  case $prefix in
    *' '*) quote='"' ;;
  esac
  sed "s|^ExecStart=/usr/bin/\([^ ]*\)|ExecStart=$quote$prefix/bin/\1$quote|; s|file:///usr/share/|file://$address/share/|" "$1"
}

make_dir() {
  [ ! -d "$1" ] || return 0
  make_dir "$(dirname -- "$1")"
  mkdir -m 755 -- "$1"
  echo "dir $1" >>"$tmp/dirs"
  [ ! -f "$manifest" ] || echo "dir $1" >>"$manifest"
}

reload() {
  if [ -n "$system_wide" ] && [ -d /run/systemd/system ]; then
    systemctl daemon-reload || true
  elif [ -z "$root" ] && [ -n "${XDG_RUNTIME_DIR:-}" ] && [ -d "${XDG_RUNTIME_DIR:-}/systemd" ]; then
    systemctl --user daemon-reload || true
  fi
}

# --- removing

remove() {
  if [ ! -f "$manifest" ]; then
    [ ! -x "$prefix/bin/drover" ] || fail "this script has not installed the drover in $prefix; apt remove drover, where it is of that package"
    fail "there is no drover in $prefix that this script has installed"
  fi
  list=$(mktemp)
  trap 'rm -f "$list"' EXIT
  cp -- "$manifest" "$list"
  own=${XDG_CONFIG_HOME:-${HOME:-/nonexistent}/.config}
  if [ -n "$system_wide" ]; then
    if [ -d /run/systemd/system ]; then
      systemctl stop 'drover@*.target' 'drover-*.service' || true
    fi
    forget /etc/systemd/system
  elif [ -z "$root" ]; then
    if [ -n "${XDG_RUNTIME_DIR:-}" ] && [ -d "${XDG_RUNTIME_DIR:-}/systemd" ]; then
      systemctl --user stop drover.target 'drover-*.service' || true
    fi
    forget "$own/systemd/user"
  fi
  # What is of the very user who types this.
  state=${DROVER_STATE_DIR:-${XDG_STATE_HOME:-${HOME:-/nonexistent}/.local/state}/drover}
  if [ -d "$state" ] && [ -O "$state" ]; then
    [ -z "$purge" ] || end_swarms
    "$prefix/bin/drover" down || true
    if [ -n "$purge" ]; then remove_whole "$state"; else say "kept: $state (--purge removes it); swarms that run go on"; fi
  fi
  if [ -d "$own/drover" ] && [ -O "$own/drover" ]; then
    if [ -n "$purge" ]; then remove_whole "$own/drover"; else say "kept: $own/drover (--purge removes it)"; fi
  fi
  if [ -n "$system_wide" ]; then
    for kept in /etc/drover /var/lib/drover; do
      [ -d "$kept" ] || continue
      if [ -n "$purge" ]; then rm -rf -- "$kept"; else say "kept: $kept (--purge removes it)"; fi
    done
  fi
  sed -n 's/^file //p' "$list" | while IFS= read -r file; do rm -f -- "$file" "$file.drover-new"; done
  rm -f -- "$manifest" "$manifest.new"
  # Inner directories before outer ones; those that hold something of others stay.
  sed -n 's/^dir //p' "$list" | LC_ALL=C sort -r | while IFS= read -r dir; do rmdir -- "$dir" 2>/dev/null || true; done
  reload
  say "drover is removed from $prefix"
}

# Whoever removes what swarms have kept has no use for their nodes.
end_swarms() {
  "$prefix/bin/drover" list --json </dev/null 2>/dev/null | tr ',' '\n' | sed -n 's/.*"swarm_id": *"\([^"]*\)".*/\1/p' |
    while IFS= read -r swarm; do
      "$prefix/bin/drover" terminate "$swarm" --force </dev/null || true
    done
}

# Links by which units of ours are started at boot.
forget() {
  [ ! -d "$1" ] || find "$1" -type l -path '*.wants/drover*' -exec rm -f -- {} +
}

# Something of ours with all that is in it, and the directory around it when nothing else was in there.
remove_whole() {
  # A process that is just ending may still put a file into it.
  rm -rf -- "$1" 2>/dev/null || { sleep 1 && rm -rf -- "$1"; }
  rmdir -- "$(dirname -- "$1")" 2>/dev/null || true
}

main "$@"
exit 0
