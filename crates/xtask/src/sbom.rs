//! The bill of materials: every package that is compiled into what is shipped, in CycloneDX's JSON, out of `cargo metadata`.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Context as _;
use serde_json::{Value, json};

use crate::shell::cargo;

/// That of this workspace, for one target.
pub(crate) fn of_this(triple: &str) -> anyhow::Result<String> {
    let text = cargo(&["metadata", "--format-version", "1", "--locked", "--filter-platform", triple]).read()?;
    let metadata: Value = serde_json::from_str(&text).context("cargo metadata gave no JSON")?;
    let bill = bill(&metadata, "drover-cli").context("cargo metadata does not know the command line")?;
    Ok(serde_json::to_string_pretty(&bill)? + "\n")
}

/// The packages that `root` needs to run. The command line holds every daemon, so it needs all that they need.
fn bill(metadata: &Value, root: &str) -> Option<Value> {
    let packages: BTreeMap<&str, &Value> = metadata["packages"]
        .as_array()?
        .iter()
        .filter_map(|package| Some((package["id"].as_str()?, package)))
        .collect();
    let nodes: BTreeMap<&str, &Value> =
        metadata["resolve"]["nodes"].as_array()?.iter().filter_map(|node| Some((node["id"].as_str()?, node))).collect();
    let root = *packages.iter().find(|(_, package)| package["name"] == root)?.0;
    let mut found = BTreeSet::from([root]);
    let mut waiting = vec![root];
    let mut edges: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    while let Some(id) = waiting.pop() {
        for dependency in nodes.get(id)?["deps"].as_array().into_iter().flatten() {
            let kinds = dependency["dep_kinds"].as_array().into_iter().flatten();
            // What only builds or tests is not in what is shipped; those kinds have a name.
            if !kinds.into_iter().any(|kind| kind["kind"].is_null()) {
                continue;
            }
            let needed = dependency["pkg"].as_str()?;
            edges.entry(id).or_default().insert(needed);
            if found.insert(needed) {
                waiting.push(needed);
            }
        }
    }
    let component = |id: &str| {
        let package = packages.get(id)?;
        let (name, version) = (package["name"].as_str()?, package["version"].as_str()?);
        let purl = format!("pkg:cargo/{name}@{version}");
        let licence = package["license"].as_str().unwrap_or("NOASSERTION").replace('/', " OR ");
        Some(json!({
            "type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl,
            "licenses": [{"expression": licence}],
        }))
    };
    let reference = |id: &str| component(id).map(|component| component["bom-ref"].clone());
    let dependencies: Vec<Value> = found
        .iter()
        .map(|id| {
            let needed: Vec<Value> = edges.get(id).into_iter().flatten().filter_map(|id| reference(id)).collect();
            json!({"ref": reference(id), "dependsOn": needed})
        })
        .collect();
    let mut whole = component(root)?;
    whole["type"] = json!("application");
    whole["name"] = json!("drover");
    Some(json!({
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {"component": whole},
        "components": found.iter().filter(|id| **id != root).filter_map(|id| component(id)).collect::<Vec<_>>(),
        "dependencies": dependencies,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_compiled_in_is_billed() {
        let package = |name: &str| json!({"id": name, "name": name, "version": "1.0.0", "license": "MIT/Apache-2.0"});
        let needs = |name: &str, kind: Value| json!({"pkg": name, "dep_kinds": [{"kind": kind, "target": null}]});
        let packages = ["cli", "lib", "deep", "tests", "builds"].map(package);
        let metadata = json!({
            "packages": packages,
            "resolve": {"nodes": [
                {"id": "cli", "deps": [needs("lib", Value::Null), needs("tests", json!("dev")), needs("builds", json!("build"))]},
                {"id": "lib", "deps": [needs("deep", Value::Null)]},
                {"id": "deep", "deps": [needs("lib", json!("dev"))]},
            ]},
        });
        let bill = bill(&metadata, "cli").unwrap();
        let names: Vec<&str> =
            bill["components"].as_array().unwrap().iter().map(|one| one["name"].as_str().unwrap()).collect();
        assert_eq!(names, ["deep", "lib"]);
        assert_eq!(bill["components"][0]["licenses"][0]["expression"], "MIT OR Apache-2.0");
        assert_eq!(bill["metadata"]["component"]["name"], "drover");
        let of = |reference: &str| {
            let all = bill["dependencies"].as_array().unwrap().clone();
            all.into_iter().find(|one| one["ref"] == reference).unwrap()["dependsOn"].clone()
        };
        assert_eq!(of("pkg:cargo/cli@1.0.0"), json!(["pkg:cargo/lib@1.0.0"]));
        assert_eq!(of("pkg:cargo/deep@1.0.0"), json!([]));
    }
}
