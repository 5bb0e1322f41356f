//! Manual pages, made from the command line itself so that they cannot fall behind it: one for `drover`, one for each of its
//! commands and one for each daemon.

use std::fmt::Write as _;
use std::io;
use std::path::Path;

use clap::{Arg, Command, CommandFactory as _};

use crate::args::Cli;
use crate::daemons;

/// Writes every page into the directory.
pub(crate) fn write(dir: &Path) -> io::Result<()> {
    std::fs::create_dir_all(dir)?;
    for (name, page) in pages() {
        std::fs::write(dir.join(format!("{name}.1")), page)?;
    }
    Ok(())
}

/// Every page with its name.
fn pages() -> Vec<(String, String)> {
    let mut root = Cli::command();
    root.build();
    let mut pages = vec![("drover".to_owned(), page("drover", &root))];
    add_commands_of(&root, "drover", &mut pages);
    for daemon in daemons::ALL {
        let name = format!("drover-{}", daemon.name);
        let mut command = (daemon.command)();
        command.build();
        pages.push((name.clone(), page(&name, &command)));
    }
    pages
}

/// A page for each command of a command, and for theirs: `drover-pki-issue` is `drover pki issue`.
fn add_commands_of(command: &Command, name: &str, pages: &mut Vec<(String, String)>) {
    for sub in command.get_subcommands().filter(|sub| !sub.is_hide_set() && sub.get_name() != "help") {
        let name = format!("{name}-{}", sub.get_name());
        pages.push((name.clone(), page(&name, sub)));
        add_commands_of(sub, &name, pages);
    }
}

fn page(name: &str, command: &Command) -> String {
    let mut out = String::new();
    let about = text(command.get_about());
    let title = name.to_uppercase();
    let _ = writeln!(out, ".TH {} 1 \"\" \"drover {}\" drover", escaped(&title), drover_types::VERSION);
    let _ = writeln!(out, ".SH NAME\n{} \\- {}", escaped(name), escaped(about.lines().next().unwrap_or_default()));
    let usage = command.clone().render_usage().to_string();
    let _ = writeln!(out, ".SH SYNOPSIS\n.nf\n{}\n.fi", lines(usage.trim_start_matches("Usage:").trim()));
    let long = text(command.get_long_about());
    let description = if long.is_empty() { about } else { long };
    let _ = writeln!(out, ".SH DESCRIPTION\n{}", lines(&description));
    let args: Vec<&Arg> = command.get_arguments().filter(|arg| !arg.is_hide_set()).collect();
    if !args.is_empty() {
        out += ".SH OPTIONS\n";
        for arg in args {
            let _ = writeln!(out, ".TP\n{}\n{}", heading(arg), lines(&help(arg)));
        }
    }
    let commands: Vec<&Command> = command.get_subcommands().filter(|command| !command.is_hide_set()).collect();
    if !commands.is_empty() {
        out += ".SH COMMANDS\n";
        for sub in commands {
            let about = text(sub.get_about());
            let _ = writeln!(out, ".TP\n\\fB{}\\fR\n{}", escaped(sub.get_name()), lines(&about));
        }
    }
    let after = text(command.get_after_help());
    if !after.is_empty() {
        let _ = writeln!(out, ".SH NOTES\n.nf\n{}\n.fi", lines(&after));
    }
    out
}

fn text(styled: Option<&clap::builder::StyledStr>) -> String {
    styled.map(ToString::to_string).unwrap_or_default()
}

fn heading(arg: &Arg) -> String {
    let mut names: Vec<String> = Vec::new();
    names.extend(arg.get_short().map(|short| format!("\\fB\\-{short}\\fR")));
    names.extend(arg.get_long().map(|long| format!("\\fB\\-\\-{}\\fR", escaped(long))));
    let takes_value = arg.get_action().takes_values();
    let values: Vec<String> = arg.get_value_names().unwrap_or_default().iter().map(ToString::to_string).collect();
    let value = if values.is_empty() { arg.get_id().as_str().to_uppercase() } else { values.join(" ") };
    let mut heading = names.join(", ");
    if takes_value {
        let _ = write!(heading, "{}\\fI{}\\fR", if heading.is_empty() { "" } else { " " }, escaped(&value));
    }
    heading
}

fn help(arg: &Arg) -> String {
    let mut help = text(arg.get_long_help().or(arg.get_help()));
    let known: Vec<String> = arg.get_possible_values().iter().map(|value| value.get_name().to_owned()).collect();
    if arg.get_action().takes_values() && !known.is_empty() {
        let _ = write!(help, " [possible values: {}]", known.join(", "));
    }
    if let Some(variable) = arg.get_env().and_then(|name| name.to_str()) {
        let _ = write!(help, " [variable: {variable}]");
    }
    help
}

/// Text in which nothing is an order to the formatter.
fn escaped(text: &str) -> String {
    text.replace('\\', "\\e").replace('-', "\\-")
}

fn lines(text: &str) -> String {
    let mut out = Vec::new();
    for line in text.lines() {
        let guard = if line.starts_with(['.', '\'']) { "\\&" } else { "" };
        out.push(format!("{guard}{}", escaped(line)));
    }
    out.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_and_daemon_has_a_page_that_the_formatter_takes() {
        let pages = pages();
        let dir = tempfile::tempdir().unwrap();
        write(dir.path()).unwrap();
        for name in ["drover", "drover-launch", "drover-pki", "drover-pki-issue", "drover-router", "drover-worker"] {
            let (_, page) = pages.iter().find(|(found, _)| found == name).unwrap_or_else(|| panic!("no {name}"));
            assert!(page.starts_with(&format!(".TH {} 1", name.to_uppercase().replace('-', "\\-"))), "{page}");
            assert!(dir.path().join(format!("{name}.1")).is_file());
        }
        let launch = &pages.iter().find(|(name, _)| name == "drover-launch").unwrap().1;
        assert!(launch.contains("\\fB\\-\\-nodes\\fR"), "{launch}");
        assert!(pages.iter().find(|(name, _)| name == "drover-router").unwrap().1.contains("\\-\\-check\\-config"));
        let mut names: Vec<&String> = pages.iter().map(|(name, _)| name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), pages.len(), "two pages of one name");
        for (name, page) in &pages {
            for line in page.lines().filter(|line| line.starts_with('.')) {
                let order = line.split(' ').next().unwrap();
                assert!([".TH", ".SH", ".TP", ".nf", ".fi"].contains(&order), "{name}: {line}");
            }
        }
    }

    #[test]
    fn nothing_in_a_text_is_an_order() {
        assert_eq!(lines(".profile\n'quoted\na-b \\n"), "\\&.profile\n\\&'quoted\na\\-b \\en");
    }
}
