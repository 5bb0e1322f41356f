//! The three calls of the Bot API that are needed.

use std::fmt;
use std::time::Duration;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use thiserror::Error;

/// What any call but the long poll may take.
const CALL: Duration = Duration::from_secs(20);
/// Longest description of a failure that is kept.
const WORDS: usize = 300;
/// Largest answer that is read.
const MOST: usize = 16 << 20;

/// Why a call did not work.
#[derive(Debug, Error)]
pub(crate) enum ApiError {
    /// Nothing came back, or nothing that can be read. Its own words would hold the address, and with it the token.
    #[error("telegram cannot be reached: {0}")]
    Unreachable(&'static str),
    /// Too many calls: come again after so long.
    #[error("telegram asks to wait for {} s", .0.as_secs())]
    Later(Duration),
    /// It says no.
    #[error("telegram refuses: {description} ({code})")]
    Refused {
        /// As of HTTP.
        code: u16,
        /// In its words.
        description: String,
    },
}

impl ApiError {
    /// The same call may work a little later. `None`: it never will.
    pub(crate) fn again_in(&self) -> Option<Duration> {
        match self {
            Self::Unreachable(_) | Self::Refused { code: 500.., .. } => Some(Duration::from_secs(2)),
            Self::Later(pause) => Some(*pause),
            // Another poller of the same bot goes away when it is ended.
            Self::Refused { code: 409, .. } => Some(Duration::from_secs(10)),
            Self::Refused { .. } => None,
        }
    }

    /// The token is not one.
    pub(crate) fn is_of_token(&self) -> bool {
        matches!(self, Self::Refused { code: 401 | 404, .. })
    }

    fn says(&self, words: &str) -> bool {
        matches!(self, Self::Refused { description, .. } if description.contains(words))
    }
}

/// One message that somebody wrote to the bot.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(crate) struct Update {
    pub(crate) update_id: i64,
    pub(crate) message: Option<Message>,
}

/// A message.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(crate) struct Message {
    #[serde(rename = "message_id")]
    pub(crate) id: i64,
    pub(crate) chat: Chat,
    #[serde(default)]
    pub(crate) text: Option<String>,
}

/// Where it was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub(crate) struct Chat {
    pub(crate) id: i64,
}

#[derive(Deserialize)]
struct Envelope {
    ok: bool,
    #[serde(default)]
    result: Value,
    #[serde(default)]
    error_code: u16,
    #[serde(default)]
    description: String,
    #[serde(default)]
    parameters: Parameters,
}

#[derive(Default, Deserialize)]
struct Parameters {
    #[serde(default)]
    retry_after: Option<u64>,
}

/// The bot.
#[derive(Clone)]
pub(crate) struct Bot {
    client: reqwest::Client,
    /// With the token, which is why this never shows itself.
    base: String,
}

impl fmt::Debug for Bot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Bot(…)")
    }
}

impl Bot {
    pub(crate) fn new(base_url: &str, token: &str) -> Result<Self, reqwest::Error> {
        let client = drover_service::web::client().connect_timeout(CALL).build()?;
        Ok(Self { client, base: format!("{}/bot{token}", base_url.trim_end_matches('/')) })
    }

    /// What was written since, at once or when something is; at the latest after `wait`.
    pub(crate) async fn updates(&self, offset: i64, most: usize, wait: Duration) -> Result<Vec<Update>, ApiError> {
        let body = json!({
            "offset": offset, "limit": most, "timeout": wait.as_secs(), "allowed_updates": ["message"],
        });
        self.call("getUpdates", &body, wait + CALL).await
    }

    /// Writes a message and says its number.
    pub(crate) async fn send(&self, chat: i64, text: &str, answers: Option<i64>) -> Result<i64, ApiError> {
        let mut body = json!({"chat_id": chat, "text": text});
        if let Some(message) = answers {
            body["reply_parameters"] = json!({"message_id": message, "allow_sending_without_reply": true});
        }
        let sent: Message = self.call("sendMessage", &body, CALL).await?;
        Ok(sent.id)
    }

    /// Makes a message say this. It is fine when it does already. False: it is not there any more.
    pub(crate) async fn edit(&self, chat: i64, message: i64, text: &str) -> Result<bool, ApiError> {
        let body = json!({"chat_id": chat, "message_id": message, "text": text});
        match self.call::<Value>("editMessageText", &body, CALL).await {
            Ok(_) => Ok(true),
            Err(error) if error.says("message is not modified") => Ok(true),
            Err(error) if error.says("message to edit not found") || error.says("message can't be edited") => Ok(false),
            Err(error) => Err(error),
        }
    }

    async fn call<T: DeserializeOwned>(&self, method: &str, body: &Value, limit: Duration) -> Result<T, ApiError> {
        let request = self.client.post(format!("{}/{method}", self.base)).json(body).timeout(limit);
        let unreachable = |error: &reqwest::Error| {
            ApiError::Unreachable(if error.is_timeout() {
                "no answer in time"
            } else if error.is_connect() {
                "no connection"
            } else {
                "the connection broke, or something else answers there"
            })
        };
        let mut response = request.send().await.map_err(|error| unreachable(&error))?;
        let status = response.status().as_u16();
        let mut bytes = Vec::new();
        while let Some(piece) = response.chunk().await.map_err(|error| unreachable(&error))? {
            if bytes.len() + piece.len() > MOST {
                return Err(ApiError::Unreachable("its answer is larger than any should be"));
            }
            bytes.extend_from_slice(&piece);
        }
        answer(&bytes, status)
    }
}

/// What an answer holds, if it is one.
fn answer<T: DeserializeOwned>(bytes: &[u8], status: u16) -> Result<T, ApiError> {
    let Ok(envelope) = serde_json::from_slice::<Envelope>(bytes) else {
        return Err(match status {
            200..500 => ApiError::Unreachable("something else answers there"),
            code => ApiError::Refused { code, description: "no reason given".to_owned() },
        });
    };
    if envelope.ok {
        return serde_json::from_value(envelope.result)
            .map_err(|_| ApiError::Unreachable("its answer has another shape than expected"));
    }
    if let Some(seconds) = envelope.parameters.retry_after {
        return Err(ApiError::Later(Duration::from_secs(seconds.clamp(1, 3600))));
    }
    let description = envelope.description.chars().take(WORDS).collect();
    Err(ApiError::Refused { code: if envelope.error_code == 0 { status } else { envelope.error_code }, description })
}

/// How many updates these bytes hold as an answer; nothing when they are none. Public for fuzzing.
pub fn updates_in(bytes: &[u8]) -> Option<usize> {
    answer::<Vec<Update>>(bytes, 200).ok().map(|updates| updates.len())
}
