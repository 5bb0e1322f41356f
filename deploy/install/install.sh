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
  root=''
  [ "$(id -u)" != 0 ] || root=1
  if [ -z "$prefix" ]; then
    if [ -n "$root" ]; then prefix=/usr; else prefix=${HOME:?is not set, so give --prefix}/.local; fi
  fi
  case $prefix in
    /*) ;;
    *) prefix=$(pwd)/$prefix ;;
  esac
  # These stand in units and in a list of lines.
  case $prefix in
    *[!A-Za-z0-9/._+@-]*) fail "--prefix $prefix: letters, digits and / . _ + @ - only" ;;
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
  tmp=$(mktemp -d)
  trap 'rm -rf "$tmp"' EXIT
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
  version=$("$source/bin/drover" --version) || fail "$source/bin/drover does not run on this machine ($(uname -m), Linux $(uname -r))"

  : >"$tmp/files"
  # What this very run makes is removed by an uninstall; what an earlier one made is in its manifest.
  [ ! -f "$manifest" ] || grep '^dir ' "$manifest" >"$tmp/dirs" || true
  [ -f "$tmp/dirs" ] || : >"$tmp/dirs"
  make_dir "$prefix/share/drover"

  (cd "$source" && find . -type f ! -name SHA256SUMS; cd "$source" && find . -type l) | sed 's|^\./||' | LC_ALL=C sort >"$tmp/list"
  while IFS= read -r file; do
    place "$file"
  done <"$tmp/list"
  if [ "$prefix" = /usr ]; then
    # What the unit of the dispatcher hands over as credentials.
    make_dir /etc/drover/keys
    chmod 700 /etc/drover/keys
  fi

  if [ -f "$manifest" ]; then
    # What the version before had and this one has not.
    sed -n 's/^file //p' "$manifest" | while IFS= read -r old; do
      grep -qxF "file $old" "$tmp/files" || rm -f "$old"
    done
    word=updated
  else
    word=installed
  fi
  LC_ALL=C sort -u "$tmp/dirs" | cat - "$tmp/files" >"$manifest.new"
  mv "$manifest.new" "$manifest"
  reload
  say "$version is $word in $prefix"
  case ":${PATH:-}:" in
    *":$prefix/bin:"*) ;;
    *) say "add it to your PATH:  export PATH=\"$prefix/bin:\$PATH\"" ;;
  esac
  [ "$word" = installed ] || say "daemons that run go on as they are until they are started again: drover down, or systemctl restart"
  say "remove it with:  sh $prefix/share/drover/install.sh --uninstall"
}

fetch() {
  name=$(basename -- "$archive")
  for part in "" .sha256; do
    case $archive in
      file://*) cp -- "${archive#file://}$part" "$tmp/$name$part" || fail "there is no ${archive#file://}$part" ;;
      *://*)
        if command -v curl >/dev/null; then
          curl -fsSL --retry 3 -o "$tmp/$name$part" "$archive$part" || fail "cannot fetch $archive$part"
        elif command -v wget >/dev/null; then
          wget -q -O "$tmp/$name$part" "$archive$part" || fail "cannot fetch $archive$part"
        else
          fail "neither curl nor wget is here: fetch the archive yourself and give --archive FILE"
        fi
        ;;
      *) cp -- "$archive$part" "$tmp/$name$part" || fail "there is no $archive$part" ;;
    esac
  done
  (cd "$tmp" && sha256sum --check --quiet --strict "$name.sha256") || fail "$archive is damaged: its checksum is not right"
  mkdir "$tmp/unpacked"
  tar -xzf "$tmp/$name" -C "$tmp/unpacked" --no-same-owner
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
    etc/*) [ "$prefix" != /usr ] || echo "/$1" ;;
    bin/* | share/*) echo "$prefix/$1" ;;
  esac
}

place() {
  to=$(target "$1")
  [ -n "$to" ] || return 0
  make_dir "$(dirname -- "$to")"
  # Put in place whole, so that a program which runs keeps its own file and nobody reads half of one.
  fresh=$to.drover-new
  rm -f "$fresh"
  if [ -L "$source/$1" ]; then
    cp -P -- "$source/$1" "$fresh"
  else
    case $1 in
      lib/systemd/*) sed "s|/usr/bin/|$prefix/bin/|; s|/usr/share/|$prefix/share/|" "$source/$1" >"$fresh" ;;
      *) cp -- "$source/$1" "$fresh" ;;
    esac
    if [ -x "$source/$1" ]; then chmod 755 "$fresh"; else chmod 644 "$fresh"; fi
  fi
  mv -f -- "$fresh" "$to"
  echo "file $to" >>"$tmp/files"
}

make_dir() {
  [ ! -d "$1" ] || return 0
  make_dir "$(dirname -- "$1")"
  mkdir -m 755 "$1"
  echo "dir $1" >>"$tmp/dirs"
}

reload() {
  if [ -n "$root" ] && [ -d /run/systemd/system ]; then
    systemctl daemon-reload || true
  elif [ -z "$root" ] && [ -n "${XDG_RUNTIME_DIR:-}" ] && [ -d "${XDG_RUNTIME_DIR:-}/systemd" ]; then
    systemctl --user daemon-reload || true
  fi
}

# --- removing

remove() {
  [ -f "$manifest" ] || fail "there is no drover in $prefix that this script has installed"
  list=$(mktemp)
  trap 'rm -f "$list"' EXIT
  cp "$manifest" "$list"
  if [ -n "$root" ]; then
    if [ -d /run/systemd/system ]; then
      systemctl stop 'drover@*.target' 'drover-*.service' || true
    fi
  else
    if [ -n "${XDG_RUNTIME_DIR:-}" ] && [ -d "${XDG_RUNTIME_DIR:-}/systemd" ]; then
      systemctl --user stop drover.target 'drover-*.service' || true
    fi
    state=${DROVER_STATE_DIR:-${XDG_STATE_HOME:-$HOME/.local/state}/drover}
    if [ -d "$state" ]; then
      "$prefix/bin/drover" down || true
      if [ -n "$purge" ]; then remove_whole "$state"; else say "kept: $state (--purge removes it)"; fi
    fi
    settings=${XDG_CONFIG_HOME:-$HOME/.config}/drover
    if [ -d "$settings" ]; then
      if [ -n "$purge" ]; then remove_whole "$settings"; else say "kept: $settings (--purge removes it)"; fi
    fi
  fi
  if [ -n "$root" ]; then
    for kept in /etc/drover /var/lib/drover; do
      [ -d "$kept" ] || continue
      if [ -n "$purge" ]; then rm -rf -- "$kept"; else say "kept: $kept (--purge removes it)"; fi
    done
  fi
  sed -n 's/^file //p' "$list" | while IFS= read -r file; do rm -f -- "$file"; done
  rm -f -- "$manifest"
  # Inner directories before outer ones; those that hold something of others stay.
  sed -n 's/^dir //p' "$list" | LC_ALL=C sort -r | while IFS= read -r dir; do rmdir -- "$dir" 2>/dev/null || true; done
  reload
  say "drover is removed from $prefix"
}

# Something of ours with all that is in it, and the directory around it when nothing else was in there.
remove_whole() {
  # A process that is just ending may still put a file into it.
  rm -rf -- "$1" 2>/dev/null || { sleep 1 && rm -rf -- "$1"; }
  rmdir -- "$(dirname -- "$1")" 2>/dev/null || true
}

main "$@"
exit 0
