//! What looks like a secret, and how it is hidden when the configuration is shown.

use crate::tree::{Node, Value};

/// What stands in place of a secret.
const MASK: &str = "***";

const TELLTALE: &[&str] = &["password", "passwd", "secret", "api_key", "apikey", "private_key", "credential", "bearer"];

/// A key whose value must not be shown. Names of variables and files that hold a secret are none themselves.
pub(crate) fn is_secret(key: &str) -> bool {
    let key = key.to_ascii_lowercase().replace('-', "_");
    if ["_env", "_file", "_path"].iter().any(|end| key.ends_with(end)) {
        return false;
    }
    key == "token" || key.ends_with("_token") || key == "auth" || TELLTALE.iter().any(|word| key.contains(word))
}

/// Hides secrets: values of secret keys, `key=value` arguments with such a key, and passwords in addresses.
pub(crate) fn mask(node: &mut Node) {
    match &mut node.value {
        Value::Map(entries) => {
            for (name, child) in entries {
                if is_secret(&name.text) && child.value != Value::Null {
                    child.value = Value::Text(MASK.to_owned());
                } else {
                    mask(child);
                }
            }
        }
        Value::List(items) => items.iter_mut().for_each(mask),
        Value::Text(text) => {
            if let Some(masked) = mask_text(text) {
                *text = masked;
            }
        }
        Value::Null | Value::Bool(_) | Value::Signed(_) | Value::Unsigned(_) | Value::Float(_) => {}
    }
}

fn mask_text(text: &str) -> Option<String> {
    if let Some((scheme, rest)) = text.split_once("://") {
        let authority = rest.split('/').next()?;
        let (user, _) = authority.rsplit_once('@')?;
        return Some(format!("{scheme}://{MASK}{}", &rest[user.len()..]));
    }
    let (key, _) = text.split_once('=')?;
    let last = key.rsplit('.').next()?.trim().trim_matches(['-', '"', '\'']);
    is_secret(last).then(|| format!("{key}={MASK}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_hidden_and_their_names_are_not() {
        let shown = |text: &str| {
            let mut tree = crate::tree::parse(text).unwrap();
            mask(&mut tree);
            tree
        };
        let clear = r#"{"api_key": "sk-1", "api_key_env": "OPENAI_API_KEY", "key_file": "/x", "AWS_SECRET_ACCESS_KEY": "y",
"github_token": "z", "tokens_per_minute": 5, "nested": [{"Password": 7}], "token": null,
"args": ["-c", "model_providers.x.api_key=\"sk-2\"", "model=o5"],
"url": "http://me:pw@collector:4317/v1", "plain": "http://collector:4317"}"#;
        let masked = r#"{"api_key": "***", "api_key_env": "OPENAI_API_KEY", "key_file": "/x", "AWS_SECRET_ACCESS_KEY": "***",
"github_token": "***", "tokens_per_minute": 5, "nested": [{"Password": "***"}], "token": null,
"args": ["-c", "model_providers.x.api_key=***", "model=o5"],
"url": "http://***@collector:4317/v1", "plain": "http://collector:4317"}"#;
        let plain = |text: &str| serde_json::to_value(shown(text)).unwrap();
        assert_eq!(plain(clear), serde_json::from_str::<serde_json::Value>(masked).unwrap());
    }
}
