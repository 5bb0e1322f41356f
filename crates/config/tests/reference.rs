//! The reference page says what the schema says.

use std::path::Path;

#[test]
fn the_reference_page_is_up_to_date() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/configuration.md");
    let page = drover_config::reference();
    if std::env::var_os("DROVER_WRITE_DOCS").is_some() {
        std::fs::write(&path, &page).unwrap();
    }
    let found = std::fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(found, page, "run `cargo xtask docs` to write docs/configuration.md again");
}

#[test]
fn every_key_is_described_and_appears_once() {
    let keys = drover_config::schema();
    assert!(keys.len() > 60, "the walk stopped early: {} keys", keys.len());
    for (index, key) in keys.iter().enumerate() {
        assert!(key.doc.ends_with('.') && key.doc.len() > 5, "{}: {:?}", key.path, key.doc);
        assert!(!key.doc.contains('|'), "{} would break the table", key.path);
        assert!(keys[..index].iter().all(|earlier| earlier.path != key.path), "{} twice", key.path);
    }
}

#[test]
fn every_error_code_has_a_paragraph() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/errors.md");
    let page = std::fs::read_to_string(path).unwrap();
    let codes: Vec<&str> = drover_types::ErrorCode::ALL.iter().map(|code| code.as_str()).collect();
    let headings: Vec<&str> = page.lines().filter_map(|line| line.strip_prefix("## `")?.strip_suffix('`')).collect();
    assert_eq!(headings, codes, "docs/errors.md has one heading for each code, in the order of the code");
    for section in page.split("\n## ").skip(1) {
        let body = section.split_once('\n').unwrap().1;
        assert!(body.trim().len() > 80, "says too little: {section}");
    }
}

#[test]
fn links_between_pages_lead_somewhere() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    for page in [
        "README.md",
        "CONTRIBUTING.md",
        "docs/USER_GUIDE.md",
        "docs/errors.md",
        "docs/architecture.md",
        "docs/operators.md",
        "docs/runbook.md",
        "docs/security.md",
        "docs/quick-start.md",
        "docs/upgrading.md",
        "docs/protocol.md",
    ] {
        let page = root.join(page);
        let text = std::fs::read_to_string(&page).unwrap();
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let target = page.parent().unwrap().join(link.split('#').next().unwrap());
            assert!(link.contains("://") || target.exists(), "{}: {link} leads nowhere", page.display());
        }
    }
}
