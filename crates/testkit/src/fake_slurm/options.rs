//! Command lines as Slurm's programs read them (GNU `getopt_long`): long names may be cut short, and what is wrong is said in
//! the same words. An option that Slurm has and the fake does not is refused too, so that nothing is silently left undone.

/// One option.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Opt {
    pub(crate) long: &'static str,
    pub(crate) short: Option<char>,
    pub(crate) value: Value,
}

/// Whether an option has a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Value {
    No,
    Must,
    May,
}

/// An option with its value.
pub(crate) const fn with(long: &'static str, short: Option<char>) -> Opt {
    Opt { long, short, value: Value::Must }
}

/// An option that may have a value.
pub(crate) const fn may(long: &'static str, short: Option<char>) -> Opt {
    Opt { long, short, value: Value::May }
}

/// An option without a value.
pub(crate) const fn flag(long: &'static str, short: Option<char>) -> Opt {
    Opt { long, short, value: Value::No }
}

/// What a command line says.
#[derive(Debug, Default)]
pub(crate) struct Parsed {
    /// Options in their order.
    pub(crate) options: Vec<(&'static str, String)>,
    /// What is left.
    pub(crate) rest: Vec<String>,
}

impl Parsed {
    /// The last value of an option.
    pub(crate) fn get(&self, long: &str) -> Option<&str> {
        self.options.iter().rev().find(|(name, _)| *name == long).map(|(_, value)| value.as_str())
    }

    /// Whether an option is there.
    pub(crate) fn has(&self, long: &str) -> bool {
        self.get(long).is_some()
    }

    /// The values of an option that takes a list.
    pub(crate) fn list(&self, long: &str) -> Option<Vec<String>> {
        let value = self.get(long)?;
        Some(value.split(',').filter(|item| !item.is_empty()).map(str::to_owned).collect())
    }
}

/// Reads a command line. With `to_the_end` options may stand behind other arguments; else the first of these ends them.
pub(crate) fn parse(program: &str, table: &[Opt], args: &[String], to_the_end: bool) -> Result<Parsed, String> {
    let mut parsed = Parsed::default();
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        if arg == "--" {
            parsed.rest.extend(args.cloned());
            break;
        }
        if let Some(long) = arg.strip_prefix("--") {
            let (name, value) = long.split_once('=').map_or((long, None), |(name, value)| (name, Some(value)));
            let opt = find(table, name).ok_or_else(|| format!("{program}: unrecognized option '--{name}'"))?;
            let value = match (opt.value, value) {
                (Value::No, Some(_)) => return Err(format!("{program}: option '--{name}' doesn't allow an argument")),
                (Value::Must, None) => {
                    args.next().cloned().ok_or_else(|| format!("{program}: option '--{name}' requires an argument"))?
                }
                (_, value) => value.unwrap_or("").to_owned(),
            };
            parsed.options.push((opt.long, value));
        } else if arg.len() > 1 && arg.starts_with('-') {
            short(program, table, arg, &mut args, &mut parsed)?;
        } else {
            parsed.rest.push(arg.clone());
            if !to_the_end {
                parsed.rest.extend(args.cloned());
                break;
            }
        }
    }
    Ok(parsed)
}

fn short<'a>(
    program: &str,
    table: &[Opt],
    arg: &str,
    args: &mut impl Iterator<Item = &'a String>,
    parsed: &mut Parsed,
) -> Result<(), String> {
    let mut chars = arg[1..].chars();
    while let Some(letter) = chars.next() {
        let opt = table.iter().find(|opt| opt.short == Some(letter));
        let opt = opt.ok_or_else(|| format!("{program}: invalid option -- '{letter}'"))?;
        let rest = chars.as_str();
        let value = match opt.value {
            Value::No => {
                parsed.options.push((opt.long, String::new()));
                continue;
            }
            Value::Must if rest.is_empty() => {
                args.next().cloned().ok_or_else(|| format!("{program}: option requires an argument -- '{letter}'"))?
            }
            Value::Must | Value::May => rest.to_owned(),
        };
        parsed.options.push((opt.long, value));
        break;
    }
    Ok(())
}

fn find<'a>(table: &'a [Opt], name: &str) -> Option<&'a Opt> {
    if let Some(exact) = table.iter().find(|opt| opt.long == name) {
        return Some(exact);
    }
    let mut fitting = table.iter().filter(|opt| opt.long.starts_with(name));
    let first = fitting.next()?;
    fitting.next().is_none().then_some(first)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &[Opt] =
        &[with("time", Some('t')), flag("hold", Some('H')), may("requeue-at", None), flag("requeue", None)];

    fn read(args: &[&str]) -> Result<Parsed, String> {
        parse("sbatch", TABLE, &args.iter().map(|arg| (*arg).to_owned()).collect::<Vec<_>>(), false)
    }

    #[test]
    fn command_lines_are_read_as_getopt_does() {
        let parsed = read(&["-Ht5", "--ti=6", "--requeue", "script", "--time=7"]).unwrap();
        assert_eq!(parsed.get("time"), Some("6"));
        assert!(parsed.has("hold") && parsed.has("requeue") && !parsed.has("requeue-at"));
        assert_eq!(parsed.rest, ["script", "--time=7"]);
        for (args, error) in [
            (&["--nope"][..], "sbatch: unrecognized option '--nope'"),
            (&["-Z"], "sbatch: invalid option -- 'Z'"),
            (&["--time"], "sbatch: option '--time' requires an argument"),
        ] {
            assert_eq!(read(args).unwrap_err(), error);
        }
    }
}
