//! What values look like: declared once for each command, for checking arguments, for the schema, and for the tests
//! that hold replies against it.

use serde_json::{Map, Value};

/// The shape of a value.
#[derive(Clone, Copy, Debug)]
pub enum Shape {
    /// A string.
    Text,
    /// A number without a fraction, of 64 bits with a sign.
    Integer,
    /// True or false.
    Switch,
    /// Anything: what a format tells of itself.
    Any,
    /// One of these words.
    Choice(&'static [&'static str]),
    /// Any number of values of one shape.
    List(&'static Shape),
    /// An object with these members, and no others.
    Object(&'static [Member]),
    /// An object whose member `tag` chooses further members.
    Union(&'static Union),
}

/// See [`Shape::Union`].
#[derive(Debug)]
pub struct Union {
    /// Members of all cases.
    pub members: &'static [Member],
    /// The member that chooses.
    pub tag: &'static str,
    /// What it may be, and the members that come with it.
    pub cases: &'static [(&'static str, &'static [Member])],
}

/// A member of an object.
#[derive(Clone, Copy, Debug)]
pub struct Member {
    /// Its name.
    pub name: &'static str,
    /// What it looks like.
    pub shape: Shape,
    /// Whether it must be there.
    pub required: bool,
}

/// A member that must be there.
#[must_use]
pub const fn required(name: &'static str, shape: Shape) -> Member {
    Member { name, shape, required: true }
}

/// A member that may be left out.
#[must_use]
pub const fn optional(name: &'static str, shape: Shape) -> Member {
    Member { name, shape, required: false }
}

impl Shape {
    /// Holds a value against the shape.
    ///
    /// # Errors
    /// What is wrong with it, in QEMU's words; `name` is the way to it.
    pub fn check(self, name: &str, value: &Value) -> Result<(), String> {
        let wrong =
            |expected: &str| Err(format!("Invalid parameter type for '{name}', expected: {expected}"));
        match (self, value) {
            (Self::Any, _) | (Self::Text, Value::String(_)) | (Self::Switch, Value::Bool(_)) => Ok(()),
            (Self::Integer, Value::Number(number)) if number.is_i64() => Ok(()),
            (Self::Choice(words), Value::String(word)) => {
                if words.contains(&word.as_str()) {
                    Ok(())
                } else {
                    Err(format!("Parameter '{name}' does not accept value '{word}'"))
                }
            }
            (Self::List(of), Value::Array(values)) => values
                .iter()
                .enumerate()
                .try_for_each(|(at, value)| of.check(&format!("{name}[{at}]"), value)),
            (Self::Object(members), Value::Object(object)) => check_members(members, &[], name, object),
            (Self::Union(union), Value::Object(object)) => union.check(name, object),
            (Self::Text | Self::Choice(_), _) => wrong("string"),
            (Self::Integer, _) => wrong("integer"),
            (Self::Switch, _) => wrong("boolean"),
            (Self::List(_), _) => wrong("array"),
            (Self::Object(_) | Self::Union(_), _) => wrong("object"),
        }
    }
}

impl Union {
    fn check(&self, name: &str, object: &Map<String, Value>) -> Result<(), String> {
        let tag = path(name, self.tag);
        let chosen = object.get(self.tag).ok_or_else(|| format!("Parameter '{tag}' is missing"))?;
        let Value::String(chosen) = chosen else {
            return Err(format!("Invalid parameter type for '{tag}', expected: string"));
        };
        let Some((_, further)) = self.cases.iter().find(|(case, _)| case == chosen) else {
            return Err(format!("Parameter '{tag}' does not accept value '{chosen}'"));
        };
        check_members(self.members, further, name, object)
    }
}

/// All that is required is there, all that is there is known.
fn check_members(
    members: &[Member],
    further: &[Member],
    name: &str,
    object: &Map<String, Value>,
) -> Result<(), String> {
    let known = || members.iter().chain(further);
    for member in known() {
        let way = path(name, member.name);
        match object.get(member.name) {
            Some(value) => member.shape.check(&way, value)?,
            None if member.required => return Err(format!("Parameter '{way}' is missing")),
            None => {}
        }
    }
    match object.keys().find(|key| !known().any(|member| member.name == **key)) {
        Some(unknown) => Err(format!("Parameter '{}' is unexpected", path(name, unknown))),
        None => Ok(()),
    }
}

fn path(name: &str, member: &str) -> String {
    if name.is_empty() { member.to_owned() } else { format!("{name}.{member}") }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const ADDRESS: Shape = Shape::Union(&Union {
        members: &[required("type", Shape::Choice(&["a", "b"]))],
        tag: "type",
        cases: &[("a", &[required("x", Shape::Integer)]), ("b", &[optional("y", Shape::List(&Shape::Text))])],
    });
    const ARGUMENTS: Shape = Shape::Object(&[required("addr", ADDRESS), optional("on", Shape::Switch)]);

    #[test]
    fn what_is_wrong_is_said_in_the_reference_s_words() {
        let check = |value: Value| ARGUMENTS.check("", &value);
        assert_eq!(check(json!({"addr": {"type": "a", "x": 3}, "on": true})), Ok(()));
        assert_eq!(check(json!({"addr": {"type": "b", "y": ["z"]}})), Ok(()));
        for (value, error) in [
            (json!({}), "Parameter 'addr' is missing"),
            (json!({"addr": 3}), "Invalid parameter type for 'addr', expected: object"),
            (json!({"addr": {}}), "Parameter 'addr.type' is missing"),
            (json!({"addr": {"type": "c"}}), "Parameter 'addr.type' does not accept value 'c'"),
            (
                json!({"addr": {"type": "a", "x": 1.5}}),
                "Invalid parameter type for 'addr.x', expected: integer",
            ),
            (json!({"addr": {"type": "a", "x": 1, "y": []}}), "Parameter 'addr.y' is unexpected"),
            (
                json!({"addr": {"type": "b", "y": [1]}}),
                "Invalid parameter type for 'addr.y[0]', expected: string",
            ),
            (json!({"addr": {"type": "b"}, "on": 1}), "Invalid parameter type for 'on', expected: boolean"),
        ] {
            assert_eq!(check(value), Err(error.to_owned()));
        }
    }
}
