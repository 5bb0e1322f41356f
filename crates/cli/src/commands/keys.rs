//! `drover keys`: the ring of keys that the gossip is sealed with, and how to change it without cutting anybody off.

use drover_proto::router as pb;
use serde_json::{Value, json};

use crate::app::App;
use crate::args::{KeyAction, Keys};
use crate::client::{Client, unary};
use crate::fault::{Exit, Fault};
use crate::render::colour::Tone;
use crate::render::table::{Cell, Table};

pub(super) async fn run(app: &App, args: Keys) -> anyhow::Result<Exit> {
    let mut client = Client::connect(app).await?;
    let rpc = &mut client.rpc;
    let (ring, said) = match args.action {
        KeyAction::List => (unary(rpc.list_keys(pb::ListKeysRequest {})).await?, None),
        KeyAction::Add(add) => {
            let key = add.key_file.as_deref().map(read_key).transpose()?.unwrap_or_default();
            let answer = unary(rpc.add_key(pb::AddKeyRequest { key: key.into() })).await?;
            let id = name(answer.key_id);
            let said = format!(
                "key {id} is on its way to the nodes; when `drover keys list` shows that all have it: drover keys use {id}"
            );
            (answer.ring.unwrap_or_default(), Some((answer.key_id, said)))
        }
        KeyAction::Use(key) => {
            let request = pb::UseKeyRequest { key_id: key.id.into(), force: key.force };
            let answer = unary(rpc.use_key(request)).await?;
            let said = format!("the nodes are told to seal with key {:02x}; the others stay readable", key.id);
            (answer.ring.unwrap_or_default(), Some((key.id.into(), said)))
        }
        KeyAction::Remove(key) => {
            let request = pb::RemoveKeyRequest { key_id: key.id.into(), force: key.force };
            let answer = unary(rpc.remove_key(request)).await?;
            let said = format!("the nodes are told to forget key {:02x}", key.id);
            (answer.ring.unwrap_or_default(), Some((key.id.into(), said)))
        }
    };
    if app.global.json {
        let mut document = fields(&ring);
        if let Some((id, _)) = &said {
            document["key_id"] = name(*id).into();
        }
        app.screen.out(&document.to_string())?;
        return Ok(Exit::Done);
    }
    app.screen.table(&table(&ring))?;
    if let Some((_, said)) = said {
        app.screen.note(&said);
    }
    Ok(Exit::Done)
}

/// A key's id as people write it.
fn name(id: u32) -> String {
    format!("{id:02x}")
}

/// 64 hexadecimal digits. Of a file, for what stands on a command line everybody on the machine can read.
fn read_key(path: &std::path::Path) -> Result<Vec<u8>, Fault> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| Fault::failed(format!("cannot read {}: {error}", path.display())))?;
    let digits: Vec<u32> = text.trim().chars().map_while(|digit| digit.to_digit(16)).collect();
    if digits.len() != 64 || text.trim().chars().count() != 64 {
        return Err(Fault::usage(format!("{} does not hold 64 hexadecimal digits", path.display()))
            .hint("make a key with `openssl rand -hex 32`, or leave --key-file out and have one made"));
    }
    Ok(digits.chunks(2).map(|pair| (pair[0] << 4 | pair[1]) as u8).collect())
}

fn table(ring: &pb::ListKeysResponse) -> Table {
    let mut table = Table::new(&["KEY", "IN USE", ">NODES", ">SEALING", "FINGERPRINT", "MISSING ON"]);
    for key in &ring.keys {
        let missing: Vec<&str> = key.missing.iter().map(String::as_str).collect();
        let everywhere = key.nodes == ring.nodes;
        table.row(vec![
            name(key.key_id).into(),
            if key.in_use { Cell::toned("yes", Tone::Good) } else { "no".into() },
            Cell::toned(format!("{}/{}", key.nodes, ring.nodes), if everywhere { Tone::Plain } else { Tone::Warn }),
            key.nodes_using.to_string().into(),
            key.fingerprint.clone().into(),
            missing.join(", ").into(),
        ]);
    }
    table
}

fn fields(ring: &pb::ListKeysResponse) -> Value {
    let key = |key: &pb::RingKey| {
        json!({
            "key_id": name(key.key_id), "fingerprint": key.fingerprint, "in_use": key.in_use, "nodes": key.nodes,
            "nodes_using": key.nodes_using, "missing": key.missing,
        })
    };
    json!({ "revision": ring.revision, "nodes": ring.nodes, "keys": ring.keys.iter().map(key).collect::<Vec<_>>() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_read_from_a_file_or_refused_without_being_shown() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        let hex = "0123456789abcdefABCDEF0123456789".repeat(2);
        std::fs::write(&path, format!("{hex}\n")).unwrap();
        assert_eq!(read_key(&path).unwrap()[..4], [0x01, 0x23, 0x45, 0x67]);
        for bad in ["", "secret", &hex[1..], &format!("{hex}00"), &format!("{}zz", &hex[2..])] {
            std::fs::write(&path, bad).unwrap();
            let fault = read_key(&path).unwrap_err();
            assert!(bad.is_empty() || !fault.message.contains(bad), "{fault:?}");
        }
    }
}
