//! Completion scripts for shells, made from the command line itself so that they cannot fall behind it.

use std::fmt::Write as _;

use clap::{Command, CommandFactory as _};

use crate::args::{Cli, Shell};

/// The script for a shell.
pub(crate) fn script(shell: Shell) -> String {
    let mut root = Cli::command();
    root.build();
    match shell {
        Shell::Bash => bash(&root),
        // Zsh reads bash completions; one script less to go wrong.
        Shell::Zsh => format!("autoload -U +X bashcompinit && bashcompinit\n{}", bash(&root)),
        Shell::Fish => fish(&root),
    }
}

fn commands(root: &Command) -> impl Iterator<Item = &Command> {
    root.get_subcommands().filter(|command| !command.is_hide_set())
}

fn flags(command: &Command) -> Vec<String> {
    command
        .get_arguments()
        .filter(|arg| !arg.is_hide_set())
        .filter_map(|arg| arg.get_long().map(|long| format!("--{long}")))
        .collect()
}

/// Words that may stand in the place of the command's first argument.
fn words(command: &Command) -> Vec<String> {
    let named = |arg: &clap::Arg| arg.get_possible_values().iter().map(|value| value.get_name().to_owned()).collect();
    match command.get_name() {
        "daemon" => crate::daemons::ALL.iter().map(|daemon| daemon.name.to_owned()).collect(),
        _ => command.get_positionals().next().map(named).unwrap_or_default(),
    }
}

/// Every command with how it is typed: `pki`, and below it `pki issue`.
fn typed(root: &Command) -> Vec<(String, &Command)> {
    let mut all = Vec::new();
    for command in commands(root) {
        all.push((command.get_name().to_owned(), command));
        for sub in subcommands(command) {
            all.push((format!("{} {}", command.get_name(), sub.get_name()), sub));
        }
    }
    all
}

/// Commands of a command.
fn subcommands(command: &Command) -> impl Iterator<Item = &Command> {
    commands(command).filter(|sub| sub.get_name() != "help")
}

fn bash(root: &Command) -> String {
    let (mut cases, mut values, mut deeper) = (String::new(), String::new(), Vec::new());
    for (name, command) in typed(root) {
        let mut all = flags(command);
        all.extend(words(command));
        all.extend(subcommands(command).map(|sub| sub.get_name().to_owned()));
        let _ = writeln!(cases, "        \"{name}\") words=\"{}\" ;;", all.join(" "));
        deeper.extend(name.contains(' ').then(|| format!("\"{name}\"")));
        for arg in command.get_arguments().filter(|arg| arg.get_action().takes_values()) {
            let possible = arg.get_possible_values();
            let known: Vec<&str> = possible.iter().map(clap::builder::PossibleValue::get_name).collect();
            if let Some(long) = arg.get_long() {
                // What is none of a few words may be a file: an empty list lets the shell look.
                let _ = writeln!(values, "        \"{name}:--{long}\") words=\"{}\" ;;", known.join(" "));
            }
        }
    }
    let names: Vec<&str> = commands(root).map(Command::get_name).collect();
    format!(
        r#"_drover() {{
    local word command="" words current="${{COMP_WORDS[COMP_CWORD]}}" previous="${{COMP_WORDS[COMP_CWORD-1]}}"
    for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
        if [ -z "$command" ]; then
            case " {names} " in *" $word "*) command="$word" ;; esac
        else
            case "$command $word" in {deeper}) command="$command $word" ;; esac
        fi
    done
    case "$command" in
        "") words="{names} {global}" ;;
{cases}    esac
    case "$command:$previous" in
{values}    esac
    COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o default -F _drover drover
"#,
        names = names.join(" "),
        deeper = deeper.join("|"),
        global = flags(root).join(" "),
    )
}

fn fish(root: &Command) -> String {
    let quoted = |text: String| text.replace('\\', "\\\\").replace('\'', "\\'");
    let about = |text: Option<&clap::builder::StyledStr>| {
        quoted(text.map(ToString::to_string).unwrap_or_default().lines().next().unwrap_or_default().to_owned())
    };
    let mut out = "complete -c drover -f\n".to_owned();
    for (name, command) in typed(root) {
        let (parent, last) = name.split_once(' ').map_or((None, name.as_str()), |(parent, last)| (Some(parent), last));
        let here = match parent {
            None => "__fish_use_subcommand".to_owned(),
            Some(parent) => {
                let others: Vec<&str> =
                    root.find_subcommand(parent).into_iter().flat_map(subcommands).map(Command::get_name).collect();
                format!(
                    "'__fish_seen_subcommand_from {parent}; and not __fish_seen_subcommand_from {}'",
                    others.join(" ")
                )
            }
        };
        let seen = parent.map_or_else(String::new, |parent| format!("__fish_seen_subcommand_from {parent}; and "));
        let seen = format!("'{seen}__fish_seen_subcommand_from {last}'");
        let _ = writeln!(out, "complete -c drover -n {here} -a {last} -d '{}'", about(command.get_about()));
        for arg in command.get_arguments().filter(|arg| !arg.is_hide_set()) {
            let Some(long) = arg.get_long() else { continue };
            let takes_value = arg.get_action().takes_values();
            let mut values = String::new();
            for value in arg.get_possible_values() {
                values.push_str(value.get_name());
                values.push(' ');
            }
            let value = match (takes_value, values.trim()) {
                (false, _) => String::new(),
                (true, "") => " -r -F".to_owned(),
                (true, values) => format!(" -x -a '{values}'"),
            };
            let help = about(arg.get_help());
            let _ = writeln!(out, "complete -c drover -n {seen} -l {long}{value} -d '{help}'");
        }
        let words = words(command).join(" ");
        if !words.is_empty() {
            let _ = writeln!(out, "complete -c drover -n {seen} -a '{words}'");
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_and_flag_is_completed() {
        let (bash, fish) = (script(Shell::Bash), script(Shell::Fish));
        let mut root = Cli::command();
        root.build();
        for (name, command) in typed(&root) {
            assert!(bash.contains(&format!("        \"{name}\") words=")), "{name}");
            assert!(fish.contains(&format!("-a {} ", command.get_name())), "{name}");
        }
        assert!(bash.contains("\"launch:--agent\") words=\"codex echo chat\""), "{bash}");
        assert!(bash.contains("--dry-run") && fish.contains("-l dry-run"));
        assert!(
            fish.contains("-n '__fish_seen_subcommand_from pki; and __fish_seen_subcommand_from issue' -l to"),
            "{fish}"
        );
    }

    #[test]
    fn bash_understands_its_script() {
        let typed = [
            ("launch --ag", "--agent --agents-md"),
            ("launch --agent e", "echo"),
            ("pki iss", "issue"),
            ("pki issue spare/0 --t", "--to"),
            // A file, which the shell knows by itself.
            ("dispatch --config dro", ""),
            ("dispatch prom", ""),
        ];
        for (line, expected) in typed {
            let words = line.split(' ').count();
            let script = format!(
                "{}\nCOMP_WORDS=(drover {line}); COMP_CWORD={words}; _drover; echo \"${{COMPREPLY[@]}}\"",
                script(Shell::Bash)
            );
            let Ok(output) = std::process::Command::new("bash").arg("-c").arg(script).output() else {
                return; // No bash on this machine; the words themselves are tested above.
            };
            assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), expected, "{line}: {output:?}");
        }
    }
}
