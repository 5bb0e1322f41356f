//! A fake of Telegram's Bot API as a program: `fake-telegram [ADDRESS [TOKEN]]`. Lines of standard input, `CHAT TEXT`, are what people write.

use std::io::BufRead as _;

use drover_testkit::fake_telegram::FakeTelegram;

fn main() -> anyhow::Result<()> {
    let mut args = std::env::args().skip(1);
    let listen = args.next().unwrap_or_else(|| "127.0.0.1:0".to_owned()).parse()?;
    let token = args.next().unwrap_or_else(|| "1:fake".to_owned());
    let fake = FakeTelegram::start_on(listen, &token)?;
    let mut stdout = std::io::stdout();
    std::io::Write::write_fmt(
        &mut stdout,
        format_args!("this is a fake of Telegram's Bot API: base_url {} token {token}\n", fake.base_url()),
    )?;
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        if let Some((chat, text)) = line.split_once(' ')
            && let Ok(chat) = chat.parse()
        {
            fake.write(chat, text);
        }
    }
    fake.join();
    Ok(())
}
