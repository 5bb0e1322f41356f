digest() {
  if command -v sha256sum >/dev/null 2>&1; then found=$(sha256sum < "$1")
  elif command -v shasum >/dev/null 2>&1; then found=$(shasum -a 256 < "$1")
  elif command -v openssl >/dev/null 2>&1; then found=$(openssl dgst -sha256 -r < "$1")
  else return 1
  fi
  found=${found%% *}
}
