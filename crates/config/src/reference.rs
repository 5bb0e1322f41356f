//! The reference page, written from the schema.

use std::fmt::Write as _;

use crate::schema::{Entry, walk};

const HEAD: &str = "# Configuration

<!-- Written from the schema by crates/config/tests/reference.rs; do not edit. -->

One YAML or JSON file with a section per daemon. Without `--config` the first of `./drover.yaml`,
`$XDG_CONFIG_HOME/drover/drover.yaml` and `/etc/drover/drover.yaml` is used, and without any of them the built-in
configuration, which is `configs/local.yaml`. A `./drover.yaml` of another user is refused.

Every key can be set by an environment variable, which wins over the file: `DROVER_ROUTER__LISTEN=127.0.0.1:0` sets
`router.listen`. Lists are separated by commas; an empty value means unset.

Durations are written `250ms`, `30s`, `5m`, `2h` or `30d`, and a bare number is seconds. Sizes are written `4096`, `64KiB`,
`16MiB` or `1GiB`. Secrets never stand in the file: keys that end in `_env` or `_file` say where they are.

`--check-config` says everything that is wrong with a file, with line and column, and exits 78. `--dump-config` shows what is
in effect.
";

/// `docs/configuration.md`.
pub fn reference() -> String {
    let mut page = HEAD.to_owned();
    let mut in_table = false;
    for entry in walk() {
        match entry {
            Entry::Section { path, doc } => {
                let _ = write!(page, "\n## `{path}`\n\n{doc}\n");
                in_table = false;
            }
            Entry::Key(key) => {
                if !in_table {
                    page += "\n| key | type | default | meaning |\n| --- | --- | --- | --- |\n";
                    in_table = true;
                }
                let _ = writeln!(page, "| `{}` | {} | {} | {} |", key.path, key.kind, shown(&key.default), key.doc);
            }
        }
    }
    page
}

fn shown(default: &str) -> String {
    match default {
        "unset" => default.to_owned(),
        "" => "empty".to_owned(),
        other => format!("`{other}`"),
    }
}
