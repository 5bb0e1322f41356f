//! Completion scripts for shells, made from the command line itself so that they cannot fall behind it.

use std::fmt::Write as _;

use clap::{ArgAction, Command, CommandFactory as _};

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

fn bash(root: &Command) -> String {
    let mut cases = String::new();
    for command in commands(root) {
        let mut all = flags(command);
        all.extend(words(command));
        let _ = writeln!(cases, "        {}) words=\"{}\" ;;", command.get_name(), all.join(" "));
    }
    let mut values = String::new();
    for command in commands(root) {
        for arg in command.get_arguments().filter(|arg| matches!(arg.get_action(), ArgAction::Set | ArgAction::Append))
        {
            let known: Vec<String> =
                arg.get_possible_values().iter().map(|value| value.get_name().to_owned()).collect();
            if let (Some(long), false) = (arg.get_long(), known.is_empty()) {
                let _ = writeln!(values, "        {}:--{long}) words=\"{}\" ;;", command.get_name(), known.join(" "));
            }
        }
    }
    let names: Vec<&str> = commands(root).map(Command::get_name).collect();
    format!(
        r#"_drover() {{
    local word command="" words current="${{COMP_WORDS[COMP_CWORD]}}" previous="${{COMP_WORDS[COMP_CWORD-1]}}"
    for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
        case " {names} " in *" $word "*) command="$word"; break ;; esac
    done
    case "$command" in
        "") words="{names} {global}" ;;
{cases}    esac
    case "$command:$previous" in
        *:--config|*:--agents-md|*:--prompt-file) COMPREPLY=($(compgen -f -- "$current")); return ;;
{values}    esac
    COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -F _drover drover
"#,
        names = names.join(" "),
        global = flags(root).join(" "),
    )
}

fn fish(root: &Command) -> String {
    let quoted = |text: String| text.replace('\\', "\\\\").replace('\'', "\\'");
    let about = |text: Option<&clap::builder::StyledStr>| {
        quoted(text.map(ToString::to_string).unwrap_or_default().lines().next().unwrap_or_default().to_owned())
    };
    let mut out = "complete -c drover -f\n".to_owned();
    for command in commands(root) {
        let name = command.get_name();
        let _ =
            writeln!(out, "complete -c drover -n __fish_use_subcommand -a {name} -d '{}'", about(command.get_about()));
        for arg in command.get_arguments().filter(|arg| !arg.is_hide_set()) {
            let Some(long) = arg.get_long() else { continue };
            let takes_value = matches!(arg.get_action(), ArgAction::Set | ArgAction::Append);
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
            let _ = writeln!(
                out,
                "complete -c drover -n '__fish_seen_subcommand_from {name}' -l {long}{value} -d '{help}'"
            );
        }
        let words = words(command).join(" ");
        if !words.is_empty() {
            let _ = writeln!(out, "complete -c drover -n '__fish_seen_subcommand_from {name}' -a '{words}'");
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
        for command in commands(&root) {
            assert!(bash.contains(&format!("        {}) words=", command.get_name())), "{}", command.get_name());
            assert!(fish.contains(&format!("-a {} ", command.get_name())), "{}", command.get_name());
        }
        assert!(bash.contains("launch:--agent) words=\"codex echo chat\""), "{bash}");
        assert!(bash.contains("--dry-run") && fish.contains("-l dry-run"));
    }

    #[test]
    fn bash_understands_its_script() {
        let script = format!(
            "{}\nCOMP_WORDS=(drover launch --ag); COMP_CWORD=2; _drover; echo \"${{COMPREPLY[@]}}\"",
            script(Shell::Bash)
        );
        let Ok(output) = std::process::Command::new("bash").arg("-c").arg(script).output() else {
            return; // No bash on this machine; the words themselves are tested above.
        };
        assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "--agent --agents-md", "{output:?}");
    }
}
