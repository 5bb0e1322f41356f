//! An entry to the sessions for people who write to a Telegram bot.

use drover_types::AgentKind;

use crate::human::HumanDuration;
use crate::schema::section;

section! {
    /// Talking to sessions by writing to a Telegram bot: `drover daemon telegram-gateway`.
    pub struct TelegramConfig {
        /// Environment variable that holds the bot's token.
        pub token_env: String = "TELEGRAM_BOT_TOKEN".into(),
        /// Chats that are answered, by their number; the log names those that try and are not.
        pub allow_chats: Vec<i64> = Vec::new(),
        /// Address of the Bot API.
        pub base_url: String = "https://api.telegram.org".into(),
        /// How long one call waits for messages.
        pub poll_timeout: HumanDuration = HumanDuration::secs(50),
        /// Agent of the sessions that it opens. Unset: `worker.agent` of the nodes.
        pub agent: Option<AgentKind> = None,
        /// Doors to the sessions, as `host:port`; the next is taken when one fails. Unset: the router, then the nodes of this host.
        pub entries: Vec<String> = Vec::new(),
    }
}
