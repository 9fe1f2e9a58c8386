//! What the schema says of a type. Read by [`super::schema`] only.

/// A type, by what it is called here. Two with one name are one type.
#[derive(Debug, Clone)]
pub enum Shape {
    /// A type of JSON itself: `str`, `int`, `bool`, `null`, `any`.
    Builtin(&'static str),
    /// A list.
    Array(Box<Shape>),
    /// A type with a definition of its own, which is asked for when it is needed: types may contain themselves.
    Named(&'static str, fn() -> Definition),
}

/// What a named type is.
#[derive(Debug, Clone)]
pub enum Definition {
    /// One of these words.
    Enum(Vec<&'static str>),
    /// Members.
    Object {
        /// Those that are always possible.
        members: Vec<MemberShape>,
        /// The member that decides which further ones are possible, and the types that hold those. A case without any
        /// has an empty type.
        variants: Option<(&'static str, Vec<(&'static str, Shape)>)>,
    },
    /// A value of one of these types.
    Alternate(Vec<Shape>),
}

/// A member of an object.
#[derive(Debug, Clone)]
pub struct MemberShape {
    /// Its name.
    pub name: &'static str,
    /// Whether it may be missing.
    pub optional: bool,
    /// Its type.
    pub shape: Shape,
}

impl Definition {
    /// An object without variants.
    pub fn object(members: Vec<MemberShape>) -> Self {
        Self::Object {
            members,
            variants: None,
        }
    }
}

impl MemberShape {
    /// A member that has to be there.
    pub(crate) fn required(name: &'static str, shape: Shape) -> Self {
        Self {
            name,
            optional: false,
            shape,
        }
    }

    /// A member that may be missing.
    pub(crate) fn optional(name: &'static str, shape: Shape) -> Self {
        Self {
            name,
            optional: true,
            shape,
        }
    }
}

/// A text.
pub(crate) const STR: Shape = Shape::Builtin("str");
/// A whole number.
pub(crate) const INT: Shape = Shape::Builtin("int");
/// Yes or no.
pub(crate) const BOOL: Shape = Shape::Builtin("bool");
/// JSON's `null`.
pub(crate) const NULL: Shape = Shape::Builtin("null");
