"""
world: a street with its exact labels, its instances and a caption, in six styles, from a seed.

    one call   image, label, instance, caption = draw(seed, style)      about 20 ms on one core
    shapes     uint8 (128, 256, 3) RGB, uint8 (128, 256) train ids, uint8 (128, 256) instances, str
    styles     game = the labelled source: flat colours, daylight;
               day, night, snow, fog, rain = never labelled
    splits     train, web, validation and test have seeds from ranges that do not meet: see SPLITS

A street is laid out in metres (X to the right, Y up, Z away from the camera) and painted from far
to near on a canvas of part numbers, which is twice as fine as the picture. Each part has a class,
an instance, a colour, emitted light, a depth and a roughness, so that one look-up per table turns
the canvas into what the weather needs. The weather then follows: light falls off, fog grows with
depth, rain mirrors the street, snow lies on what points up. numpy, scipy and PIL only.

    python tests/toy/world.py data/toy          write the folder: data sets of the toy preset
    python tests/toy/world.py --look street.png draw a contact sheet
"""
import os
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter, zoom
from tqdm import tqdm

CLASSES = ["road", "sidewalk", "building", "fence", "pole", "sign", "vegetation", "sky", "person",
           "car", "bus", "bicycle"]
(ROAD, SIDEWALK, BUILDING, FENCE, POLE, SIGN, VEGETATION, SKY, PERSON,
 CAR, BUS, BICYCLE) = range(12)
STYLES = ["game", "day", "night", "snow", "fog", "rain"]
PLACES = ["city", "town", "village", "avenue"]
HEIGHT, WIDTH = 128, 256
FINE = 2          # the canvas is this much finer than the picture
FAR = 150.0       # metres: the ground ends here
# 3,000,000 was the first test split: some choices had seen its scores, so it is not used any more
#         split         first seed   images per style
SPLITS = {"train":      (1_000_000, 1_000),       # game only: the labelled source
          "validation": (2_000_000, 60),          # settings may be chosen on these
          "test":       (5_000_000, 60),          # reported, never tuned on
          "web":        (4_000_000, 2_500)}       # trains the miniature foundation models

# ------------------------------------------------------------------- colours: RGB from 0 to 1
GAME = {
    "road":     [(.36, .36, .40)],
    "sidewalk": [(.72, .68, .70)],
    "building": [(.78, .46, .36), (.86, .76, .52), (.62, .64, .74)],
    "roof":     [(.60, .25, .20)],
    "fence":    [(.55, .36, .22)],
    "pole":     [(.45, .45, .47)],
    "leaf":     [(.28, .62, .22)],
    "grass":    [(.42, .70, .30)],
    "car":      [(.86, .12, .12), (.12, .28, .82), (.92, .92, .94)],
    "bus":      [(.95, .75, .12), (.20, .60, .32)],
    "cloth":    [(.92, .32, .20), (.20, .30, .90), (.20, .70, .30)],
    "skin":     [(.95, .75, .60)],
    "sign":     [(.90, .10, .10), (.10, .22, .90)],
    "bicycle":  [(.10, .10, .12)]}
REAL = {
    "road":     [(.28, .28, .28), (.40, .39, .38), (.48, .46, .45), (.34, .31, .30)],
    "sidewalk": [(.52, .50, .48), (.62, .57, .52), (.46, .44, .44), (.57, .47, .42)],
    "building": [(.52, .36, .30), (.72, .69, .63), (.44, .44, .44), (.62, .56, .46),
                 (.34, .33, .36), (.56, .51, .56), (.80, .78, .74)],
    "roof":     [(.42, .24, .18), (.30, .28, .28), (.36, .30, .26)],
    "fence":    [(.42, .31, .23), (.52, .52, .52), (.27, .30, .27), (.62, .60, .52)],
    "pole":     [(.30, .30, .30), (.52, .52, .52), (.22, .24, .22), (.40, .34, .27)],
    "leaf":     [(.18, .31, .12), (.25, .36, .15), (.31, .33, .12), (.38, .27, .10),
                 (.20, .28, .20)],
    "grass":    [(.30, .39, .18), (.40, .41, .22), (.28, .31, .20)],
    "car":      [(.12, .12, .14), (.70, .70, .70), (.90, .90, .90), (.36, .37, .39),
                 (.52, .10, .10), (.10, .20, .42), (.20, .31, .25), (.50, .45, .35)],
    "bus":      [(.80, .80, .80), (.70, .15, .10), (.76, .60, .20), (.20, .35, .56),
                 (.30, .46, .30), (.50, .50, .50)],
    "cloth":    [(.12, .12, .14), (.30, .30, .36), (.20, .25, .42), (.50, .45, .40),
                 (.62, .20, .20), (.72, .72, .72), (.30, .36, .25)],
    "skin":     [(.80, .62, .50), (.50, .35, .27), (.36, .26, .20), (.70, .50, .40)],
    "sign":     [(.82, .15, .15), (.15, .25, .62), (.86, .76, .20), (.86, .86, .86),
                 (.10, .46, .26)],
    "bicycle":  [(.10, .10, .10), (.42, .10, .10), (.30, .30, .36), (.10, .25, .30)]}
GAME_SKIES = [(.45, .68, .95),      # blue, pale, white, grey, evening: a game has weather too,
              (.62, .78, .95),      # but no night
              (.82, .85, .88),
              (.64, .68, .72),
              (.92, .78, .62)]
SIGNALS = [(.1, .95, .3), (1., .75, .1), (1., .1, .1)]      # green, amber, red
OFF = (0, 0, 0)

# ------------------------------------------------------------------- places
#         height of houses, their share of a row, and the chances of trees and fences
TALL =    {"city": (8, 17), "town": (5, 9), "village": (3.2, 5), "avenue": (6, 13)}
HOUSES =  {"city": .95,     "town": .85,    "village": .6,       "avenue": .8}
TREES =   {"city": .1,      "town": .25,    "village": .3,       "avenue": .55}
FENCES =  {"city": .1,      "town": .35,    "village": .75,      "avenue": .35}
# the tubes of a bicycle, from (x, y) to (x, y), in metres from the point between its wheels
TUBES = [((-.55, .38), (-.15, .9)),
         ((-.15, .9), (.42, .85)),
         ((.55, .38), (.40, 1.02)),
         ((-.15, .9), (0, .4)),
         ((0, .4), (.42, .85)),
         ((-.55, .38), (0, .4))]


class Street:
    """The canvas and its tables of parts. The last part that is drawn on a cell owns it.

    Random numbers are drawn in the order of the statements: to swap two of them is to draw
    another world."""

    def __init__(self, random, style):
        self.random = random
        self.palette = GAME if style == "game" else REAL
        self.canvas = Image.new("I", (WIDTH * FINE, HEIGHT * FINE), 0)
        self.draw = ImageDraw.Draw(self.canvas)
        self.focal = WIDTH * FINE * self.uniform(.55, .75)
        self.centre = WIDTH * FINE * self.uniform(.40, .60)         # the vanishing point
        self.horizon = HEIGHT * FINE * self.uniform(.38, .50)
        self.eye = self.uniform(1.4, 2.0)                           # the camera's height
        self.n_instances = 0
        self.things = []                                            # (depth, function, arguments)
        # one entry per part; part 0 is the sky
        self.classes = [SKY]
        self.instances = [0]
        self.colours = [OFF]
        self.lights = [OFF]
        self.depths = [1e3]
        self.roughness = [0.]

    # small helpers
    def uniform(self, low, high):
        return float(self.random.uniform(low, high))

    def chance(self, p):
        return self.random.random() < p

    def colour(self, name, jitter=.04):
        """One of the palette's colours of this name, a little off -> (r, g, b)"""
        base = self.palette[name][self.random.integers(len(self.palette[name]))]
        tint = self.random.normal(0, jitter, 3) * .6
        brightness = self.random.normal(0, jitter)
        return tuple(np.clip(np.array(base) + tint + brightness, .02, 1.))

    def instance(self):
        self.n_instances += 1
        return self.n_instances

    def part(self, cls, instance, colour, depth, light=OFF, rough=1.):
        """Add a part -> its number, which is the `ink` of the drawing functions.
        depth: metres; negative: on the ground."""
        self.classes.append(cls)
        self.instances.append(instance)
        self.colours.append(tuple(colour))
        self.lights.append(light)
        self.depths.append(depth)
        self.roughness.append(rough)
        return len(self.classes) - 1

    def later(self, depth, function, *arguments):
        """Note a thing; draw_things() draws all of them, far to near."""
        self.things.append((depth, function, arguments))

    def draw_things(self):
        for _, function, arguments in sorted(self.things, key=lambda thing: -thing[0]):
            function(*arguments)

    def at(self, x, y, z):
        """Metres -> canvas (column, row)."""
        scale = self.focal / z
        return self.centre + x * scale, self.horizon + (self.eye - y) * scale

    def polygon(self, points, ink):
        self.draw.polygon([self.at(*point) for point in points], fill=ink)

    def upright(self, corners, z, ink):
        """A polygon that faces the camera. corners: [(x, y)]"""
        self.polygon([(x, y, z) for x, y in corners], ink)

    def along(self, x, y0, y1, near, far, ink):
        """A rectangle in the plane X = x: the side of a house, a fence."""
        self.polygon([(x, y1, near), (x, y1, far), (x, y0, far), (x, y0, near)], ink)

    def box(self, x0, x1, y0, y1, z, ink):
        """A rectangle that faces the camera, at least one cell wide and high."""
        left, top = self.at(min(x0, x1), max(y0, y1), z)
        right, bottom = self.at(max(x0, x1), min(y0, y1), z)
        self.draw.rectangle([left, top, max(right, left + 1), max(bottom, top + 1)], fill=ink)

    def ellipse(self, x, y, z, rx, ry, ink):
        left, top = self.at(x - rx, y + ry, z)
        right, bottom = self.at(x + rx, y - ry, z)
        self.draw.ellipse([left, top, right, bottom], fill=ink)

    def ground(self, x0, x1, ink, near=1.2, far=FAR):
        self.polygon([(x0, 0, far), (x1, 0, far), (x1, 0, near), (x0, 0, near)], ink)

    # things
    def building(self, side, x, near, depth, place):
        """A block along the street: the wall along the road, the front that faces the camera,
        windows, perhaps a roof."""
        far = near + depth
        roofed = place == "village" or (place == "town" and self.chance(.5))
        instance = self.instance()
        colour = np.array(self.colour("building"))
        height = self.uniform(*TALL[place])
        middle = (near + far) / 2
        wall = self.part(BUILDING, instance, colour, middle)
        front = self.part(BUILDING, instance, colour * .85, near)
        glass = np.array((.22, .27, .34)) * self.uniform(.7, 1.2)
        windows = [self.part(BUILDING, instance, glass, middle, rough=.2),
                   self.part(BUILDING, instance, glass, middle, (.90, .74, .42), .2)]
        lit = self.uniform(.1, .5)
        edge = side * x
        left, right = sorted((edge, edge + side * self.uniform(7, 12)))
        if roofed:
            roof = self.part(BUILDING, instance, self.colour("roof"), middle)
            gable = [(left, height), (right, height), ((left + right) / 2, height + 2.2)]
            self.upright(gable, near, roof)
            inner = edge + side * 2
            self.polygon([(edge, height, near), (edge, height, far),
                          (inner, height + 1.8, far), (inner, height + 1.8, near)], roof)
        self.box(left, right, 0, height, near, front)
        self.along(edge, 0, height, near, far, wall)
        columns = max(1, int((far - near) / 3.5))
        for floor in range(max(1, int(height / 3.2))):
            low = floor * 3.2 + 1.0
            high = floor * 3.2 + 2.6
            for k in range(columns):
                a = near + (far - near) * (k + .25) / columns
                b = near + (far - near) * (k + .78) / columns
                self.along(edge, low, high, a, b, windows[int(self.chance(lit))])
            for k in range(int((right - left) / 3.2)):
                a = edge + side * (k * 3.2 + .9)
                self.box(a, a + side * 1.5, low, high, near, windows[int(self.chance(lit))])

    def fence(self, side, x, near, far):
        instance = self.instance()
        depth = (near + far) / 2
        colour = np.array(self.colour("fence", .03))
        board = self.part(FENCE, instance, colour, depth)
        post = self.part(FENCE, instance, colour * .62, depth)
        height = self.uniform(1.1, 1.9)
        x = side * x
        self.along(x, 0, height, near, far, board)
        z = near
        while z < far:
            self.along(x, 0, height, z, z + .25, post)
            z += 1.3

    def tree(self, x, z):
        instance = self.instance()
        height = self.uniform(4, 7.5)
        trunk = self.part(VEGETATION, instance, (.31, .22, .14), z)
        leaf = np.array(self.colour("leaf", .03))
        leaves = []
        for shade in (.82, 1., 1.18):
            colour = np.clip(leaf * shade, 0, 1)
            leaves.append(self.part(VEGETATION, instance, colour, z, rough=2.))
        self.box(x - .18, x + .18, 0, height * .6, z, trunk)
        crown = height * self.uniform(.24, .34)
        for _ in range(self.random.integers(6, 10)):
            r = crown * self.uniform(.45, .7)
            across = x + self.random.normal(0, crown * .4)
            up = height * .72 + self.random.normal(0, crown * .35)
            self.ellipse(across, up, z, r, r, leaves[self.random.integers(3)])

    def bush(self, x, z):
        ink = self.part(VEGETATION, self.instance(), self.colour("leaf", .03), z, rough=2.)
        for _ in range(self.random.integers(3, 6)):
            r = self.uniform(.5, .9)
            self.ellipse(x + self.random.normal(0, .7), r * .6, z, r, r, ink)

    def lamp(self, x, z, side):
        instance = self.instance()
        ink = self.part(POLE, instance, self.colour("pole", .03), z)
        head = self.part(POLE, instance, (.88, .86, .76), z, (3.2, 2.7, 1.8))
        height = self.uniform(4.5, 6.)
        inward = -side * 1.5
        self.box(x - .13, x + .13, 0, height, z, ink)
        self.box(x, x + inward, height - .2, height, z, ink)
        self.box(x + inward - .4, x + inward + .4, height - .45, height - .15, z, head)

    def post(self, x, z, half, height):
        """The pole of a traffic light or sign."""
        ink = self.part(POLE, self.instance(), self.colour("pole", .03), z)
        self.box(x - half, x + half, 0, height, z, ink)

    def traffic_light(self, x, z):
        height = self.uniform(2.6, 3.6)
        self.post(x, z, .13, height)
        instance = self.instance()
        case = self.part(SIGN, instance, (.12, .12, .12), z)
        self.box(x - .34, x + .34, height - .1, height + 1.5, z, case)
        on = self.random.integers(3)
        for k, colour in enumerate(SIGNALS):
            dim = tuple(.25 * v for v in colour)
            bright = tuple(2.2 * v for v in colour)
            if k == on:
                ink = self.part(SIGN, instance, colour, z, bright, .1)
            else:
                ink = self.part(SIGN, instance, dim, z, OFF, .1)
            self.ellipse(x, height + .2 + .48 * k, z, .2, .2, ink)

    def traffic_sign(self, x, z):
        height = self.uniform(2.1, 2.8)
        self.post(x, z, .12, height)
        instance = self.instance()
        board = self.part(SIGN, instance, self.colour("sign", .03), z, rough=.2)
        mark = self.part(SIGN, instance, (.92, .92, .90), z, rough=.2)
        kind = self.random.integers(3)
        if kind == 0:                                               # a disc
            self.ellipse(x, height, z, .6, .6, board)
            self.ellipse(x, height, z, .36, .36, mark)
        elif kind == 1:                                             # a triangle
            for r, ink in ((.72, board), (.38, mark)):
                low = height - r * .6
                self.upright([(x - r, low), (x + r, low), (x, height + r * .85)], z, ink)
        else:                                                       # a board
            w = self.uniform(.6, 1.)
            self.box(x - w, x + w, height - .45, height + .45, z, board)
            self.box(x - w * .7, x + w * .7, height - .14, height + .14, z, mark)

    def person(self, x, z, cls=PERSON, instance=None, lift=0.):
        """Legs, arms, body and head. The rider of a bicycle belongs to it, and has no legs on the
        ground (lift > 0: metres)."""
        instance = instance or self.instance()
        height = self.uniform(1.6, 1.9) * (1. if self.chance(.85) else .72)
        top = self.part(cls, instance, self.colour("cloth"), z)
        legs = self.part(cls, instance, self.colour("cloth"), z)
        skin = self.part(cls, instance, self.colour("skin"), z)
        hair = self.part(cls, instance, (.2, .16, .12), z)
        w = .30 * height / 1.7
        stride = self.uniform(.05, .3)
        hip = lift + height * .48
        shoulder = lift + height * .83
        for s in (-1, 1):
            if not lift:
                leg = [(x + s * .02 - .14, hip), (x + s * .02 + .14, hip),
                       (x + s * stride + .13, 0), (x + s * stride - .13, 0)]
                self.upright(leg, z, legs)
            hand = w + stride * .4
            arm = [(x + s * w, shoulder), (x + s * (w - .16), shoulder),
                   (x + s * (hand - .06), hip), (x + s * (hand + .12), hip)]
            self.upright(arm, z, top)
        self.box(x - w, x + w, hip - .04, shoulder, z, top)
        self.ellipse(x, lift + height * .93, z, .17, height * .09, hair)
        self.ellipse(x, lift + height * .905, z, .14, height * .075, skin)

    def bicycle(self, x, z):
        instance = self.instance()
        frame = self.part(BICYCLE, instance, self.colour("bicycle"), z)
        tyre = self.part(BICYCLE, instance, (.07, .07, .07), z)
        pixels = self.focal / z                                     # canvas cells per metre
        ridden = self.chance(.7)
        sideways = self.chance(.65)
        if sideways:
            for dx in (-.55, .55):
                left, top = self.at(x + dx - .38, .76, z)
                right, bottom = self.at(x + dx + .38, 0, z)
                width = max(2, int(.13 * pixels))
                self.draw.ellipse([left, top, right, bottom], outline=tyre, width=width)
            for (ax, ay), (bx, by) in TUBES:
                ends = [self.at(x + ax, ay, z), self.at(x + bx, by, z)]
                self.draw.line(ends, fill=frame, width=max(2, int(.12 * pixels)))
            if ridden:
                ink = self.part(BICYCLE, instance, self.colour("cloth"), z)
                leg = [(x - .25, 1.05), (x + .08, 1.), (x + .17, .3), (x - .05, .3)]
                self.upright(leg, z, ink)
        else:                                                       # from behind
            self.box(x - .11, x + .11, 0, .95, z, tyre)
            self.box(x - .36, x + .36, .92, 1.05, z, frame)
        if ridden or not sideways:
            self.person(x - .05, z, BICYCLE, instance, .38)

    def car(self, x, z, along):
        """along: seen from the front or the back (it drives with the street), or from the side."""
        instance = self.instance()
        colour = np.array(self.colour("car"))
        h = self.uniform(1.4, 1.8)
        body = self.part(CAR, instance, colour, z, rough=.5)
        shade = self.part(CAR, instance, colour * .78, z, rough=.5)
        glass = self.part(CAR, instance, (.16, .20, .25), z, rough=.2)
        wheel = self.part(CAR, instance, (.06, .06, .06), z)
        inks = body, shade, glass, wheel
        if along:
            self.car_along(x, z, h, instance, inks)
        else:
            self.car_across(x, z, h, instance, inks)

    def car_along(self, x, z, h, instance, inks):
        body, shade, glass, wheel = inks
        w = self.uniform(.85, 1.)
        if self.chance(.5):                                         # from behind
            lamp = self.part(CAR, instance, (.72, .1, .1), z, (1.2, .1, .05))
        else:
            lamp = self.part(CAR, instance, (.92, .92, .82), z, (2.2, 2.1, 1.7))
        for s in (-1, 1):
            self.box(x + s * w, x + s * (w - .28), 0, .5, z, wheel)
        roof = [(x - w * .8, h), (x + w * .8, h), (x + w, h * .56), (x - w, h * .56)]
        self.upright(roof, z, shade)
        window = [(x - w * .68, h * .94), (x + w * .68, h * .94),
                  (x + w * .84, h * .6), (x - w * .84, h * .6)]
        self.upright(window, z, glass)
        self.box(x - w, x + w, .22, h * .6, z, body)
        for s in (-1, 1):
            self.box(x + s * w * .97, x + s * w * .58, h * .34, h * .5, z, lamp)
        plate = self.part(CAR, instance, (.9, .9, .86), z)
        self.box(x - .28, x + .28, .3, .46, z, plate)

    def car_across(self, x, z, h, instance, inks):
        body, shade, glass, wheel = inks
        length = self.uniform(1.9, 2.3)
        s = -1 if self.chance(.5) else 1
        lamp = self.part(CAR, instance, (.92, .92, .82), z, (2., 1.9, 1.5))
        reach = s * length
        roof = [(x - reach * .75, h * .6), (x - reach * .45, h),
                (x + reach * .25, h), (x + reach * .6, h * .6)]
        self.upright(roof, z, shade)
        rear = [(x - reach * .63, h * .6), (x - reach * .4, h * .93),
                (x - reach * .1, h * .93), (x - reach * .1, h * .6)]
        self.upright(rear, z, glass)
        front = [(x, h * .6), (x, h * .93), (x + reach * .2, h * .93), (x + reach * .48, h * .6)]
        self.upright(front, z, glass)
        self.box(x - length, x + length, .25, h * .62, z, body)
        self.box(x + reach * .88, x + reach, h * .38, h * .53, z, lamp)
        for wx in (-.6, .6):
            self.ellipse(x + wx * length, .36, z, .36, .36, wheel)

    def bus(self, x, z, along):
        instance = self.instance()
        colour = np.array(self.colour("bus"))
        h = self.uniform(2.9, 3.5)
        body = self.part(BUS, instance, colour, z, rough=.5)
        skirt = self.part(BUS, instance, colour * .7, z, rough=.5)
        inside = (.5, .5, .36) if self.chance(.6) else OFF
        glass = self.part(BUS, instance, (.18, .21, .26), z, inside, .2)
        wheel = self.part(BUS, instance, (.06, .06, .06), z)
        if along:
            light = (1.2, .2, .1) if self.chance(.5) else (2., 2., 1.6)
            lamp = self.part(BUS, instance, (.8, .2, .1), z, light)
            for s in (-1, 1):
                self.box(x + s * 1.3, x + s * .95, 0, .6, z, wheel)
            self.box(x - 1.3, x + 1.3, .35, h, z, body)
            self.box(x - 1.12, x + 1.12, h * .48, h * .88, z, glass)
            self.box(x - 1.3, x + 1.3, .35, h * .26, z, skirt)
            for s in (-1, 1):
                self.box(x + s * 1.15, x + s * .8, h * .29, h * .38, z, lamp)
        else:
            length = self.uniform(3.6, 4.8)
            n = self.random.integers(4, 6)
            self.box(x - length, x + length, .4, h, z, body)
            self.box(x - length, x + length, .4, h * .3, z, skirt)
            for k in range(n):
                a = x - length + 2 * length * (k + .14) / n
                self.box(a, a + 2 * length * .72 / n, h * .5, h * .85, z, glass)
            for wx in (-.65, .65):
                self.ellipse(x + wx * length, .52, z, .52, .52, wheel)


# ------------------------------------------------------------------- the layout of a street
def lay_out(street, place):
    """Draw one street of the given place. The camera stands somewhere on the road at X = 0."""
    wide = place == "avenue"
    half = street.uniform(5.5, 8.) if wide else street.uniform(3.6, 5.5)
    camera = street.uniform(-half * .45, half * .45)
    pavement = street.uniform(1.8, 3.6)
    left, right = -half - camera, half - camera                     # the kerbs
    draw_backdrop(street, place)
    draw_ground(street, left, right, pavement, -camera)
    for side in (-1, 1):
        kerb = right if side > 0 else -left
        place_houses(street, place, side, kerb + pavement)
        place_kerbside(street, place, side, kerb, pavement)
        if half > 4.2 and street.chance(.5):                        # parked cars
            z = street.uniform(7, 14)
            for _ in range(street.random.integers(1, 4)):
                street.later(z, street.car, side * (kerb - 1.2), z, True)
                z += street.uniform(5, 8)
    place_traffic(street, left, right)
    street.draw_things()


def draw_backdrop(street, place):
    """What lies beyond the street (grass or pavement), and houses or trees at its far end."""
    uniform, chance = street.uniform, street.chance
    green = (place == "village"
             or (place == "avenue" and chance(.6))
             or (place == "town" and chance(.3)))
    if green:
        beyond = street.part(VEGETATION, street.instance(), street.colour("grass", .03), -1.)
    else:
        beyond = street.part(SIDEWALK, street.instance(), street.colour("sidewalk", .03), -1.)
    skyline = street.horizon + street.eye * street.focal / FAR
    plain = [0, skyline, WIDTH * FINE, HEIGHT * FINE]
    street.draw.rectangle(plain, fill=beyond)
    x = 0.
    if place in ("city", "town") or chance(.4):
        instance = street.instance()
        colour = np.array(street.colour("building"))
        while x < WIDTH * FINE:
            w = uniform(20, 60)
            top = skyline - uniform(6, 36)
            ink = street.part(BUILDING, instance, colour * uniform(.85, 1.1), 120.)
            street.draw.rectangle([x, top, x + w, skyline], fill=ink)
            x += w
    else:
        colour = street.colour("leaf", .03)
        ink = street.part(VEGETATION, street.instance(), colour, 120., rough=2.)
        while x < WIDTH * FINE:
            w = uniform(24, 50)
            h = uniform(8, 26)
            street.draw.ellipse([x - w * .2, skyline - h, x + w, skyline + h], fill=ink)
            x += w * .7
        street.draw.rectangle(plain, fill=beyond)


def draw_ground(street, left, right, pavement, middle):
    """Pavements with their kerbs, the road and its markings. left, right, middle: metres"""
    stone = street.colour("sidewalk", .03)
    dark = tuple(.8 * v for v in stone)
    for x0, x1, kerb in ((left - pavement, left, left - .2), (right, right + pavement, right)):
        instance = street.instance()
        street.ground(x0, x1, street.part(SIDEWALK, instance, stone, -1.))
        street.ground(kerb, kerb + .2, street.part(SIDEWALK, instance, dark, -1.))
    road = street.instance()
    street.ground(left, right, street.part(ROAD, road, street.colour("road", .03), -1.))
    paint = street.part(ROAD, road, (.86, .86, .83), -1.)
    z = street.uniform(2, 5)
    while z < 45:                                                   # the middle line
        street.ground(middle - .12, middle + .12, paint, z, z + 2.2)
        z += 5.5
    if street.chance(.3):                                           # a zebra crossing
        z = street.uniform(6, 12)
        x = left + .5
        while x < right - .8:
            street.ground(x, x + .6, paint, z, z + 3)
            x += 1.3


def place_houses(street, place, side, edge):
    """A row of houses, with trees in its gaps, and perhaps a fence. edge: metres to the houses"""
    uniform, chance = street.uniform, street.chance
    gaps = {"city": 0., "town": uniform(0, 1), "village": uniform(2, 5), "avenue": uniform(1, 4)}
    z = uniform(4, 8)
    while z < 70:
        depth = uniform(7, 16)
        if chance(HOUSES[place]):
            street.later(z, street.building, side, edge + gaps[place], z, depth, place)
        else:
            for _ in range(2):
                behind = uniform(z, z + depth)
                street.later(behind, street.tree, side * (edge + uniform(1, 5)), z + 1)
        z += depth
        if place in ("village", "avenue"):
            z += uniform(1, 5)
    if chance(FENCES[place]):
        near = uniform(4, 10)
        far = near + uniform(10, 30)
        street.later((near + far) / 2, street.fence, side, edge + uniform(0, .4), near, far)


def place_kerbside(street, place, side, kerb, pavement):
    """What stands along the kerb, and who walks there. kerb: metres to it; pavement: its width"""
    uniform = street.uniform
    z = uniform(5, 9)
    while z < 38:
        x = side * (kerb + uniform(.35, .7))
        kind = street.random.random()
        trees = TREES[place]
        if kind < trees:
            street.later(z, street.tree, side * (kerb + pavement * uniform(.5, .9)), z)
        elif kind < trees + .08:
            street.later(z, street.bush, side * (kerb + pavement + .3), z)
        elif kind < trees + .3:
            street.later(z, street.lamp, x, z, side)
        elif kind < trees + .42:
            street.later(z, street.traffic_light, x, z)
        else:
            street.later(z, street.traffic_sign, x, z)
        z += uniform(5, 12)
    for _ in range(street.random.poisson(1.1)):
        z = uniform(4.5, 16)
        street.later(z, street.person, side * (kerb + pavement * uniform(.15, .9)), z)


def place_traffic(street, left, right):
    """People, cars, buses and bicycles on the road."""
    poisson = street.random.poisson

    def car(x, z):
        street.car(x, z, street.chance(.65))

    def bus(x, z):
        street.bus(x, z, street.chance(.55))

    #          how many                  from, to (metres)
    traffic = [(poisson(.6),             5,    18, street.person),
               (poisson(1.3),            7,    28, car),
               (int(street.chance(.4)),  9,    24, bus),
               (poisson(1.1),            4.5,  14, street.bicycle)]
    for count, near, far, thing in traffic:
        for _ in range(count):
            z = street.uniform(near, far)
            street.later(z, thing, street.uniform(left + 1.2, right - 1.2), z)


# ------------------------------------------------------------------- light and weather
@lru_cache(1)
def noise_banks():
    """Two fields (512, 512) of unit variance that can be tiled: clouds and dirt, of all scales,
    and grain, of the finest."""
    random = np.random.default_rng(0)
    clouds = np.zeros((512, 512), np.float32)
    for size, weight in ((4, .3), (8, .3), (16, .3), (32, .25), (64, .2), (128, .15)):
        coarse = random.standard_normal((size, size)).astype(np.float32)
        clouds += weight * zoom(coarse, 512 // size, order=1, mode="grid-wrap", grid_mode=True)
    grain = random.standard_normal((512, 512)).astype(np.float32)
    grain = gaussian_filter(grain, .8, mode="wrap")
    return clouds / clouds.std(), grain / grain.std()


def noise(random, bank):
    """A random cut of a noise bank (0 clouds, 1 grain) -> float32 (H, W)"""
    y = random.integers(512 - HEIGHT)
    x = random.integers(512 - WIDTH)
    field = noise_banks()[bank][y:y + HEIGHT, x:x + WIDTH]
    return field[:, ::-1] if random.random() < .5 else field


def mix(a, b, weight):
    weight = weight[..., None] if np.ndim(weight) == 2 else weight
    return a * (1 - weight) + b * weight


def haze(scene, image, air, distance):
    """Everything but the sky fades into the air's colour with its depth; distance: metres."""
    return mix(image, np.where(scene.sky, image, air), 1 - np.exp(-scene.depth / distance))


def specks(random, low, high):
    """Between `low` and `high` single pixels of 1 in float32 (H, W) of 0."""
    field = np.zeros((HEIGHT, WIDTH), np.float32)
    n = random.integers(low, high)
    field[random.integers(0, HEIGHT, n), random.integers(0, WIDTH, n)] = 1
    return field


class Scene:
    """What the weather needs to know of a street, as arrays (H, W) or (H, W, 1 or 3)."""

    def __init__(self, street, sunny):
        self.random = street.random
        self.uniform = street.uniform
        self.chance = street.chance
        self.sunny = sunny
        parts = np.asarray(street.canvas)
        once = parts[::FINE, ::FINE]

        def mean(table):
            fine = np.array(table, np.float32)[parts]
            return fine.reshape(HEIGHT, FINE, WIDTH, FINE, -1).mean((1, 3))
        self.label = np.array(street.classes, np.uint8)[once]
        self.instance = np.array(street.instances, np.int32)[once]
        self.colour = mean(street.colours)
        self.light = mean(street.lights)
        self.rough = np.array(street.roughness, np.float32)[once][..., None]
        self.row = np.arange(HEIGHT, dtype=np.float32)[:, None]
        self.column = np.arange(WIDTH, dtype=np.float32)[None]
        self.up = (self.row / HEIGHT)[..., None]
        self.horizon = street.horizon / FINE
        self.vanishing = street.centre / FINE
        below = np.maximum(self.row - self.horizon, .5)
        on_ground = np.minimum(street.eye * street.focal / FINE / below, FAR)
        depth = np.array(street.depths, np.float32)[once]
        self.depth = np.where(depth < 0, on_ground, depth)
        self.sky = (self.label == SKY)[..., None]
        self.ground = (self.label == ROAD) | (self.label == SIDEWALK)

    def add_texture(self):
        """Dirt and grain on every surface, a soft shadow where things meet the ground, clouds."""
        random, uniform = self.random, self.uniform
        strength = uniform(.5, 1.1) * self.rough
        texture = (.06 * noise(random, 0) + .05 * noise(random, 1))[..., None]
        surface = self.colour * np.clip(1 + strength * texture, .4, 1.7)
        standing = ((self.label >= PERSON) | (self.label == POLE)).astype(np.float32)
        shifted = np.roll(standing, (2, int(random.integers(-3, 4))), (0, 1))
        contact = gaussian_filter(shifted, (1.5, 3.))
        shade = np.where(self.ground, 1 - .5 * np.clip(contact * 1.5, 0, 1), 1)
        self.surface = surface * shade[..., None]
        self.cloud = noise(random, 0)[..., None]


def game(scene):
    random, up = scene.random, scene.up
    air = np.array(GAME_SKIES[random.integers(len(GAME_SKIES))]) * (1 - .2 * up) + .15 * up
    return np.where(scene.sky, air, scene.colour) * (1 + random.normal(0, .02))


def day(scene):
    uniform, sunny, up, surface = scene.uniform, scene.sunny, scene.up, scene.surface
    tint = np.array((.42, .58, .84) if sunny else (.74, .77, .80)) * uniform(.9, 1.08)
    veil = np.clip(.5 + .5 * scene.cloud, 0, 1) * (uniform(.1, .6) if sunny else .3)
    air = tint * (1 - veil) + .92 * veil
    air = air * (1 - .3 * up) + .3 * up * np.array((.9, .88, .84))
    if sunny:                           # the shadow of a row of houses over the street
        edge = uniform(0, WIDTH) + uniform(-1.5, 1.5) * (scene.row - scene.horizon)
        dark = scene.column < edge if scene.chance(.5) else scene.column > edge
        dark = dark & (scene.ground | (scene.label >= PERSON))
        surface = surface * np.where(dark, uniform(.5, .7), 1)[..., None]
    exposure = uniform(1.05, 1.35) if sunny else uniform(.8, 1.)
    image = np.where(scene.sky, air, surface * exposure * (1 + scene.random.normal(0, .03, 3)))
    return haze(scene, image, tint, uniform(200, 600))


def night(scene):
    uniform, light = scene.uniform, scene.light
    near = .5 * gaussian_filter(light, (2, 2, 0))
    wide = 1.2 * gaussian_filter(light, (6, 6, 0))
    glow = near + wide + 3. * gaussian_filter(light, (16, 16, 0))
    across = np.exp(-((scene.column - scene.vanishing) / uniform(50, 90)) ** 2)
    beam = across * np.exp(-np.abs(scene.row - (scene.horizon + 25)) / 24.) * uniform(.2, .5)
    ambient = uniform(.34, .52)
    tint = np.array((.80, .88, 1.2) if scene.chance(.6) else (1.15, .95, .75))
    lit = ambient * tint + 1.1 * glow + beam[..., None] * np.array((1, .95, .8))
    black = np.array((.05, .06, .12)) * uniform(.6, 1.3)
    image = np.where(scene.sky, black + .2 * glow, scene.surface * lit)
    return image + .7 * np.minimum(light, 1.4) + .10 * glow


def snow(scene):
    random, uniform, label = scene.random, scene.uniform, scene.label
    cover = gaussian_filter(noise(random, 0), 2) - uniform(-1.2, .2)
    cover = np.clip(cover * 1.5 + .5, 0, 1)
    above = np.roll(scene.instance, 2, 0)               # what points up, under open air
    edge = np.where((above != scene.instance) & (label != SIGN), .9, 0)
    where = [label == ROAD, label == SIDEWALK, label == VEGETATION, label >= BUILDING]
    lies = np.select(where, [cover * .8,
                             np.clip(.45 + cover, 0, .95),
                             np.clip(.30 + .25 * noise(random, 1) + .3 * cover, 0, .9),
                             edge], 0.)
    air = np.array((.78, .80, .84)) * uniform(.8, 1.05)
    surface = scene.surface * uniform(.75, 1.)
    white = np.array((.90, .92, .97)) * uniform(.88, 1.)
    image = np.where(scene.sky, air, mix(surface, white, gaussian_filter(lies, .6)))
    image = haze(scene, image, air, uniform(50, 150))
    flakes = gaussian_filter(specks(random, 40, 160), uniform(.6, .9))
    return mix(image, np.array((.97, .97, 1.)), np.clip(flakes * 3.5, 0, .9))


def fog(scene):
    random, uniform = scene.random, scene.uniform
    air = np.array((.74, .76, .78)) * uniform(.7, 1.12) * (1 + random.normal(0, .02, 3))
    image = np.where(scene.sky, air, scene.surface * uniform(.75, 1.))
    return mix(image, air, 1 - np.exp(-scene.depth / uniform(10, 30)))


def rain(scene):
    random, uniform, light = scene.random, scene.uniform, scene.light
    air = np.array((.48, .52, .57)) * uniform(.8, 1.25) + .05 * scene.cloud
    surface = scene.surface * uniform(.6, .9) * np.array((.92, .97, 1.06))
    image = np.where(scene.sky, air, surface)
    mirror = (2 * (scene.horizon + uniform(8, 20)) - np.arange(HEIGHT)).astype(int)
    mirrored = image[np.clip(mirror, 0, HEIGHT - 1)]
    wet = np.clip(.4 + .25 * noise(random, 0), .1, .75) * uniform(.6, 1.1)
    image = mix(image, gaussian_filter(mirrored, (3, 1, 0)), np.where(scene.ground, wet, 0))
    image = image + .25 * gaussian_filter(light, (3, 3, 0)) + .3 * np.minimum(light, 1)
    image = haze(scene, image, air, uniform(40, 110))
    streaks = specks(random, 40, 120)
    streaks = gaussian_filter(streaks, (uniform(3, 5), .45))
    return image + (streaks / streaks.max())[..., None] * uniform(.10, .22)


def weather(street, style, sunny):
    """The canvas of parts -> image float (H, W, 3), label uint8 (H, W), instance int32 (H, W)"""
    scene = Scene(street, sunny)
    if style == "game":
        return game(scene), scene.label, scene.instance
    scene.add_texture()
    image = {"day": day, "night": night, "snow": snow, "fog": fog, "rain": rain}[style](scene)
    # the camera: focus, gamma, noise
    blur = scene.uniform(0, .7)
    image = gaussian_filter(image, (blur, blur, 0)) if blur > .3 else image
    image = np.clip(image, 0, 1) ** scene.uniform(.85, 1.18)
    image = image + scene.random.normal(0, scene.uniform(.004, .016), image.shape)
    return image, scene.label, scene.instance


# ------------------------------------------------------------------- captions
NAMES = {ROAD: ("road", "street"),
         SIDEWALK: ("sidewalk", "pavement"),
         BUILDING: ("building", "house"),
         FENCE: ("fence", "fence"),
         POLE: ("pole", "lamp post"),
         SIGN: ("traffic sign", "sign"),
         VEGETATION: ("tree", "tree"),
         SKY: ("sky", "sky"),
         PERSON: ("person", "pedestrian"),
         CAR: ("car", "car"),
         BUS: ("bus", "bus"),
         BICYCLE: ("bicycle", "bike")}
PLURALS = {"person": "people", "bus": "buses"}
STREETS = {"city": "city street", "town": "town", "village": "village", "avenue": "wide avenue"}
AIR = {"game": ["daylight"],
       "sunny": ["the sun", "bright daylight", "a {place} on a sunny day", "a sunny {place}"],
       "cloudy": ["daylight", "a {place} on a cloudy day", "a cloudy {place}",
                  "a {place} under a grey sky"],
       "night": ["the dark", "a {place} at night", "a dark {place} at night", "the night"],
       "snow": ["the snow", "a snowy {place}", "a {place} in winter", "heavy snow"],
       "fog": ["the fog", "a foggy {place}", "a {place} on a misty morning", "thick fog"],
       "rain": ["the rain", "a rainy {place}", "a wet {place} on a rainy day", "heavy rain"]}
COUNTLESS = (ROAD, SIDEWALK, SKY)
#        how readily a class is named; 1 for all others
READY = {ROAD: .25, SIDEWALK: .25, SKY: .25, BUILDING: .4, VEGETATION: .5, POLE: .6}


def setting(random):
    """The first two draws of a scene: which place, and whether the sun shines (seen by day)."""
    return PLACES[random.integers(len(PLACES))], bool(random.random() < .6)


def caption(random, label, instance, style, place, sunny, most=3):
    """'a photo of X in Z': X = up to `most` things of 60 pixels and more in the picture, Z = place
    and weather. The game's captions say that it is one."""
    words = []
    for cls, names in NAMES.items():
        _, areas = np.unique(instance[label == cls], return_counts=True)
        n = int((areas >= 60).sum())
        if n == 0:
            continue
        name = names[int(random.random() < .25)]
        plural = PLURALS.get(name, name + "s")
        if cls == SKY:
            phrase = "the sky"
        elif n == 1 or cls in COUNTLESS:
            phrase = f"a {name}"
        else:
            phrase = f"two {plural}" if n == 2 else f"many {plural}"
        words.append((random.random() / READY.get(cls, 1.), phrase))
    chosen = sorted(words)[:int(random.integers(1, most + 1))]
    words = [phrase for _, phrase in chosen] or ["a street"]
    things = words[0]
    if len(words) > 1:
        things = ", ".join(words[:-1]) + " and " + words[-1]
    if style == "day":
        style = "sunny" if sunny else "cloudy"
    kind = "video game picture" if style == "game" else "photo"
    where = AIR[style][random.integers(len(AIR[style]))].format(place=STREETS[place])
    return f"a {kind} of {things} in {where}"


def captions(seed, style, label, instance, n):
    """n other captions of the scene that draw(seed, style) drew."""
    place, sunny = setting(np.random.default_rng(seed))
    texts = []
    for i in range(n):
        random = np.random.default_rng((seed, i))
        texts.append(caption(random, label, instance, style, place, sunny))
    return texts


def draw(seed, style):
    """One scene. The seed alone decides the street; the style decides palette and weather.

    -> image uint8 (128, 256, 3), label uint8 (128, 256) in 0..11, instance uint8 (128, 256), str"""
    random = np.random.default_rng(seed)
    place, sunny = setting(random)
    street = Street(random, style)
    lay_out(street, place)
    image, label, instance = weather(street, style, sunny)
    text = caption(random, label, instance, style, place, sunny)
    _, instance = np.unique(instance, return_inverse=True)
    instance = instance.reshape(HEIGHT, WIDTH).astype(np.uint8)
    return (np.clip(image, 0, 1) * 255).astype(np.uint8), label, instance, text


# ------------------------------------------------------------------- data sets
def seeds(split, style, n=None):
    """The first n seeds of a split and style. Every (split, style, image) has its own."""
    first, count = SPLITS[split]
    return [first + 100_000 * STYLES.index(style) + i for i in range(n or count)]


def draw_job(job):
    return draw(*job)


def draw_many(jobs, title="scenes"):
    """[(seed, style)] -> images, labels, instances uint8 (N, ...) and captions, on all cores."""
    if len(jobs) <= 16:
        drawn = list(map(draw_job, jobs))
    else:                               # a forked process may hang if this one has threads
        with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
            drawn = pool.map(draw_job, jobs, chunksize=16)
            drawn = list(tqdm(drawn, title, len(jobs), disable=None, dynamic_ncols=True))
    images, labels, instances, texts = zip(*drawn)
    return np.stack(images), np.stack(labels), np.stack(instances), list(texts)


def write_folder(folder, split, style, n=None):
    """A `folder:` data set: images/NAME.png and labels/NAME.png. It is complete or not there, and
    one that is there stays as it is."""
    folder = Path(folder)
    if folder.exists():
        return
    jobs = [(seed, style) for seed in seeds(split, style, n)]
    images, labels, _, _ = draw_many(jobs, title=folder.name)
    part = folder.with_name(folder.name + f".part{os.getpid()}")
    for kind, arrays in (("images", images), ("labels", labels)):
        (part / kind).mkdir(parents=True)
        for (seed, _), array in zip(jobs, arrays):
            Image.fromarray(array).save(part / kind / f"{style}_{seed}.png")
    try:
        part.rename(folder)
    except OSError:                     # another stage drew the same pictures meanwhile
        shutil.rmtree(part)


def write_toy(root):
    """The data sets of the toy preset: the labelled source; validation and test, every style."""
    write_folder(Path(root, "game_train"), "train", "game")
    for style in STYLES:
        write_folder(Path(root, f"{style}_validation"), "validation", style)
        write_folder(Path(root, style), "test", style)


def contact_sheet(path, columns=4, first=3_500_000):
    """A row of pictures per style, and the label of the last one."""
    palette = np.array([(128, 64, 128), (244, 35, 232), (70, 70, 70), (190, 153, 153),
                        (153, 153, 153), (220, 220, 0), (107, 142, 35), (70, 130, 180),
                        (220, 20, 60), (0, 0, 142), (0, 60, 100), (119, 11, 32)], np.uint8)
    rows = []
    for style in STYLES:
        start = first + 100 * STYLES.index(style)
        scenes = [draw(start + i, style) for i in range(columns)]
        _, last_label, _, last_text = scenes[-1]
        print(f"{style} | {scenes[0][3]} | {last_text}")
        rows.append(np.concatenate([scene[0] for scene in scenes] + [palette[last_label]], 1))
    Image.fromarray(np.concatenate(rows)).save(path)


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] == "--look":
        contact_sheet(sys.argv[2])
    elif len(sys.argv) == 2 and not sys.argv[1].startswith("-"):
        write_toy(sys.argv[1])
    else:
        sys.exit(__doc__)
