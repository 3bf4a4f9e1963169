"""
world: a procedural street, its exact labels, its instances and a caption, in six styles. numpy, scipy and PIL only.

    one call   image, label, instance, caption = draw(seed, style)       about 20 ms on one core
    shapes     uint8 (128, 256, 3) RGB, uint8 (128, 256) train ids, uint8 (128, 256) instance ids, str
    styles     game = the labelled source: flat colours, daylight; day, night, snow, fog, rain = never labelled
    splits     train, web, validation and test take their seeds from ranges that do not meet: see SPLITS

A street is laid out in metres (X to the right, Y up, Z away from the camera), and painted from far to near on a canvas
of part numbers, twice as fine as the picture. A part knows its class, instance, colour, emitted light, depth and
roughness, so one look-up per table turns the canvas into all that the weather needs. The weather then does what it
does: light falls off, fog grows with depth, rain mirrors the street, snow lies on what points up.

    python tests/toy/world.py data/toy          writes the folder: data sets of the toy preset (skips what is there)
    python tests/toy/world.py --look street.png draws a contact sheet
"""
import os
import sys
from functools import lru_cache
from multiprocessing import Pool
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter, zoom

CLASSES = ["road", "sidewalk", "building", "fence", "pole", "sign", "vegetation", "sky", "person", "car", "bus", "bicycle"]
ROAD, SIDEWALK, BUILDING, FENCE, POLE, SIGN, VEGETATION, SKY, PERSON, CAR, BUS, BICYCLE = range(12)
STYLES = ["game", "day", "night", "snow", "fog", "rain"]
PLACES = ["city", "town", "village", "avenue"]
HEIGHT, WIDTH = 128, 256
FINE = 2          # the canvas is this much finer than the picture
FAR = 150.0       # metres: the ground ends here
#         split         first seed   images a style
SPLITS = {"train":      (1_000_000, 1_000),       # game only: the labelled source
          "validation": (2_000_000, 60),          # settings may be chosen on these
          "test":       (5_000_000, 60),          # reported, never tuned on. 3,000,000 was the first one: some choices had seen its scores, so it was given up
          "web":        (4_000_000, 2_500)}       # what the miniature foundation models are trained on


# ----------------------------------------------------------------------------- colours (linear-ish RGB in 0..1)
GAME = dict(road=[(.36, .36, .40)], sidewalk=[(.72, .68, .70)], building=[(.78, .46, .36), (.86, .76, .52), (.62, .64, .74)],
            roof=[(.60, .25, .20)], fence=[(.55, .36, .22)], pole=[(.45, .45, .47)], leaf=[(.28, .62, .22)], grass=[(.42, .70, .30)],
            car=[(.86, .12, .12), (.12, .28, .82), (.92, .92, .94)], bus=[(.95, .75, .12), (.20, .60, .32)], cloth=[(.92, .32, .2), (.2, .3, .9), (.2, .7, .3)],
            skin=[(.95, .75, .60)], sign=[(.90, .10, .10), (.10, .22, .90)], bicycle=[(.10, .10, .12)])
REAL = dict(road=[(.28, .28, .28), (.40, .39, .38), (.48, .46, .45), (.34, .31, .30)],
            sidewalk=[(.52, .50, .48), (.62, .57, .52), (.46, .44, .44), (.57, .47, .42)],
            building=[(.52, .36, .30), (.72, .69, .63), (.44, .44, .44), (.62, .56, .46), (.34, .33, .36), (.56, .51, .56), (.80, .78, .74)],
            roof=[(.42, .24, .18), (.30, .28, .28), (.36, .30, .26)], fence=[(.42, .31, .23), (.52, .52, .52), (.27, .30, .27), (.62, .60, .52)],
            pole=[(.30, .30, .30), (.52, .52, .52), (.22, .24, .22), (.40, .34, .27)],
            leaf=[(.18, .31, .12), (.25, .36, .15), (.31, .33, .12), (.38, .27, .10), (.20, .28, .20)],
            grass=[(.30, .39, .18), (.40, .41, .22), (.28, .31, .20)],
            car=[(.12, .12, .14), (.70, .70, .70), (.90, .90, .90), (.36, .37, .39), (.52, .10, .10), (.10, .20, .42), (.20, .31, .25), (.50, .45, .35)],
            bus=[(.80, .80, .80), (.70, .15, .10), (.76, .60, .20), (.20, .35, .56), (.30, .46, .30), (.50, .50, .50)],
            cloth=[(.12, .12, .14), (.30, .30, .36), (.20, .25, .42), (.50, .45, .40), (.62, .20, .20), (.72, .72, .72), (.30, .36, .25)],
            skin=[(.80, .62, .50), (.50, .35, .27), (.36, .26, .20), (.70, .50, .40)],
            sign=[(.82, .15, .15), (.15, .25, .62), (.86, .76, .20), (.86, .86, .86), (.10, .46, .26)],
            bicycle=[(.10, .10, .10), (.42, .10, .10), (.30, .30, .36), (.10, .25, .30)])
GAME_SKIES = [(.45, .68, .95), (.62, .78, .95), (.82, .85, .88), (.64, .68, .72), (.92, .78, .62)]      # blue, pale, white, grey, evening: a game has weather too, but no night


class Street:
    """The canvas and its part tables. Objects are drawn far to near; the last part drawn on a cell owns it."""

    def __init__(self, random, style):
        self.random, self.palette = random, GAME if style == "game" else REAL
        self.canvas = Image.new("I", (WIDTH * FINE, HEIGHT * FINE), 0)
        self.draw = ImageDraw.Draw(self.canvas)
        self.focal = WIDTH * FINE * self.uniform(.55, .75)
        self.centre = WIDTH * FINE * self.uniform(.40, .60)          # the vanishing point
        self.horizon = HEIGHT * FINE * self.uniform(.38, .50)
        self.eye = self.uniform(1.4, 2.0)                            # camera height
        self.classes, self.instances, self.colours, self.lights, self.depths, self.roughness = [SKY], [0], [(0, 0, 0)], [(0, 0, 0)], [1e3], [0.]
        self.n_instances = 0

    # small helpers -----------------------------------------------------------
    def uniform(self, low, high):
        return float(self.random.uniform(low, high))

    def chance(self, p):
        return self.random.random() < p

    def colour(self, name, jitter=.04):
        base = self.palette[name][self.random.integers(len(self.palette[name]))]
        return tuple(np.clip(np.array(base) + self.random.normal(0, jitter, 3) * .6 + self.random.normal(0, jitter), .02, 1.))

    def instance(self):
        self.n_instances += 1
        return self.n_instances

    def part(self, cls, instance, colour, depth, light=(0, 0, 0), rough=1.):
        """A new row of the part tables -> its number, the 'ink' that the drawing calls take. depth < 0: on the ground."""
        for table, value in zip((self.classes, self.instances, self.colours, self.lights, self.depths, self.roughness),
                                (cls, instance, colour, light, depth, rough)):
            table.append(value)
        return len(self.classes) - 1

    def at(self, x, y, z):
        """Metres -> canvas (column, row)."""
        scale = self.focal / z
        return self.centre + x * scale, self.horizon + (self.eye - y) * scale

    def polygon(self, points, ink):
        self.draw.polygon([self.at(*p) for p in points], fill=ink)

    def box(self, x0, x1, y0, y1, z, ink):
        (left, top), (right, bottom) = self.at(min(x0, x1), max(y0, y1), z), self.at(max(x0, x1), min(y0, y1), z)
        self.draw.rectangle([left, top, max(right, left + 1), max(bottom, top + 1)], fill=ink)

    def ellipse(self, x, y, z, rx, ry, ink):
        (left, top), (right, bottom) = self.at(x - rx, y + ry, z), self.at(x + rx, y - ry, z)
        self.draw.ellipse([left, top, right, bottom], fill=ink)

    def ground(self, x0, x1, ink, near=1.2, far=FAR):
        self.polygon([(x0, 0, far), (x1, 0, far), (x1, 0, near), (x0, 0, near)], ink)

    # things ------------------------------------------------------------------
    def building(self, side, x, near, far, tall, roofed):
        """A block along the street: the wall along the road, the wall that faces the camera, windows, perhaps a roof or a shop."""
        instance, colour = self.instance(), np.array(self.colour("building"))
        height, depth = self.uniform(*tall), (near + far) / 2
        wall = self.part(BUILDING, instance, tuple(colour), depth)
        front = self.part(BUILDING, instance, tuple(colour * .85), near)
        glass = np.array((.22, .27, .34)) * self.uniform(.7, 1.2)
        windows = [self.part(BUILDING, instance, tuple(glass), depth, rough=.2), self.part(BUILDING, instance, tuple(glass), depth, (.90, .74, .42), .2)]
        lit, edge = self.uniform(.1, .5), side * x
        left, right = sorted((edge, edge + side * self.uniform(7, 12)))
        if roofed:
            roof = self.part(BUILDING, instance, self.colour("roof"), depth)
            self.polygon([(left, height, near), (right, height, near), ((left + right) / 2, height + 2.2, near)], roof)
            self.polygon([(edge, height, near), (edge, height, far), (edge + side * 2, height + 1.8, far), (edge + side * 2, height + 1.8, near)], roof)
        self.box(left, right, 0, height, near, front)
        self.polygon([(edge, height, near), (edge, height, far), (edge, 0, far), (edge, 0, near)], wall)
        columns = max(1, int((far - near) / 3.5))
        for floor in range(max(1, int(height / 3.2))):
            low, high = floor * 3.2 + 1.0, floor * 3.2 + 2.6
            for k in range(columns):
                a, b = near + (far - near) * (k + .25) / columns, near + (far - near) * (k + .78) / columns
                self.polygon([(edge, high, a), (edge, high, b), (edge, low, b), (edge, low, a)], windows[int(self.chance(lit))])
            for k in range(int((right - left) / 3.2)):
                a = edge + side * (k * 3.2 + .9)
                self.box(a, a + side * 1.5, low, high, near, windows[int(self.chance(lit))])

    def fence(self, side, x, near, far):
        instance, depth = self.instance(), (near + far) / 2
        colour = np.array(self.colour("fence", .03))
        board, post = self.part(FENCE, instance, tuple(colour), depth), self.part(FENCE, instance, tuple(colour * .62), depth)
        height, x = self.uniform(1.1, 1.9), side * x
        self.polygon([(x, height, near), (x, height, far), (x, 0, far), (x, 0, near)], board)
        z = near
        while z < far:
            self.polygon([(x, height, z), (x, height, z + .25), (x, 0, z + .25), (x, 0, z)], post)
            z += 1.3

    def tree(self, x, z):
        instance, height = self.instance(), self.uniform(4, 7.5)
        trunk, leaf = self.part(VEGETATION, instance, (.31, .22, .14), z), np.array(self.colour("leaf", .03))
        leaves = [self.part(VEGETATION, instance, tuple(np.clip(leaf * shade, 0, 1)), z, rough=2.) for shade in (.82, 1., 1.18)]
        self.box(x - .18, x + .18, 0, height * .6, z, trunk)
        crown = height * self.uniform(.24, .34)
        for _ in range(self.random.integers(6, 10)):
            r = crown * self.uniform(.45, .7)
            self.ellipse(x + self.random.normal(0, crown * .4), height * .72 + self.random.normal(0, crown * .35), z, r, r, leaves[self.random.integers(3)])

    def bush(self, x, z):
        ink = self.part(VEGETATION, self.instance(), self.colour("leaf", .03), z, rough=2.)
        for _ in range(self.random.integers(3, 6)):
            r = self.uniform(.5, .9)
            self.ellipse(x + self.random.normal(0, .7), r * .6, z, r, r, ink)

    def lamp(self, x, z, side):
        ink = self.part(POLE, self.instance(), self.colour("pole", .03), z)
        head = self.part(POLE, self.n_instances, (.88, .86, .76), z, (3.2, 2.7, 1.8))
        height, inward = self.uniform(4.5, 6.), -side * 1.5
        self.box(x - .13, x + .13, 0, height, z, ink)
        self.box(x, x + inward, height - .2, height, z, ink)
        self.box(x + inward - .4, x + inward + .4, height - .45, height - .15, z, head)

    def traffic_light(self, x, z):
        height = self.uniform(2.6, 3.6)
        self.box(x - .13, x + .13, 0, height, z, self.part(POLE, self.instance(), self.colour("pole", .03), z))
        instance = self.instance()
        self.box(x - .34, x + .34, height - .1, height + 1.5, z, self.part(SIGN, instance, (.12, .12, .12), z))
        on = self.random.integers(3)
        for k, lamp in enumerate([(.1, .95, .3), (1., .75, .1), (1., .1, .1)]):
            light = tuple(2.2 * v for v in lamp) if k == on else (0, 0, 0)
            ink = self.part(SIGN, instance, lamp if k == on else tuple(.25 * v for v in lamp), z, light, .1)
            self.ellipse(x, height + .2 + .48 * k, z, .2, .2, ink)

    def traffic_sign(self, x, z):
        height = self.uniform(2.1, 2.8)
        self.box(x - .12, x + .12, 0, height, z, self.part(POLE, self.instance(), self.colour("pole", .03), z))
        instance = self.instance()
        board, mark = self.part(SIGN, instance, self.colour("sign", .03), z, rough=.2), self.part(SIGN, instance, (.92, .92, .90), z, rough=.2)
        kind = self.random.integers(3)
        if kind == 0:
            self.ellipse(x, height, z, .6, .6, board), self.ellipse(x, height, z, .36, .36, mark)
        elif kind == 1:
            for r, ink in ((.72, board), (.38, mark)):
                self.polygon([(x - r, height - r * .6, z), (x + r, height - r * .6, z), (x, height + r * .85, z)], ink)
        else:
            w = self.uniform(.6, 1.)
            self.box(x - w, x + w, height - .45, height + .45, z, board), self.box(x - w * .7, x + w * .7, height - .14, height + .14, z, mark)

    def person(self, x, z, cls=PERSON, instance=None, lift=0.):
        """A figure of legs, arms, body and head. As a cyclist it belongs to the bicycle (lift > 0: no legs on the ground)."""
        instance = instance or self.instance()
        height = self.uniform(1.6, 1.9) * (1. if self.chance(.85) else .72)
        top, legs = self.part(cls, instance, self.colour("cloth"), z), self.part(cls, instance, self.colour("cloth"), z)
        skin, hair = self.part(cls, instance, self.colour("skin"), z), self.part(cls, instance, (.2, .16, .12), z)
        w, stride, hip, shoulder = .30 * height / 1.7, self.uniform(.05, .3), lift + height * .48, lift + height * .83
        for s in (-1, 1):
            if not lift:
                self.polygon([(x + s * .02 - .14, hip, z), (x + s * .02 + .14, hip, z), (x + s * stride + .13, 0, z), (x + s * stride - .13, 0, z)], legs)
            self.polygon([(x + s * w, shoulder, z), (x + s * (w - .16), shoulder, z), (x + s * (w + stride * .4 - .06), hip, z), (x + s * (w + stride * .4 + .12), hip, z)], top)
        self.box(x - w, x + w, hip - .04, shoulder, z, top)
        self.ellipse(x, lift + height * .93, z, .17, height * .09, hair)
        self.ellipse(x, lift + height * .905, z, .14, height * .075, skin)

    def bicycle(self, x, z):
        instance = self.instance()
        frame, tyre = self.part(BICYCLE, instance, self.colour("bicycle"), z), self.part(BICYCLE, instance, (.07, .07, .07), z)
        pixels, ridden, sideways = self.focal / z, self.chance(.7), self.chance(.65)
        if sideways:                                                            # seen from the side
            for dx in (-.55, .55):
                (left, top), (right, bottom) = self.at(x + dx - .38, .76, z), self.at(x + dx + .38, 0, z)
                self.draw.ellipse([left, top, right, bottom], outline=tyre, width=max(2, int(.13 * pixels)))
            for a, b in (((-.55, .38), (-.15, .9)), ((-.15, .9), (.42, .85)), ((.55, .38), (.40, 1.02)), ((-.15, .9), (0, .4)), ((0, .4), (.42, .85)), ((-.55, .38), (0, .4))):
                self.draw.line([self.at(x + a[0], a[1], z), self.at(x + b[0], b[1], z)], fill=frame, width=max(2, int(.12 * pixels)))
            if ridden:
                leg = self.part(BICYCLE, instance, self.colour("cloth"), z)
                self.polygon([(x - .25, 1.05, z), (x + .08, 1., z), (x + .17, .3, z), (x - .05, .3, z)], leg)
        else:                                                                           # from behind
            self.box(x - .11, x + .11, 0, .95, z, tyre), self.box(x - .36, x + .36, .92, 1.05, z, frame)
        if ridden or not sideways:
            self.person(x - .05, z, BICYCLE, instance, .38)

    def car(self, x, z, along):
        """along: seen from the front or the back (it drives with the street); otherwise from the side."""
        instance, colour, h = self.instance(), np.array(self.colour("car")), self.uniform(1.4, 1.8)
        body, shade = self.part(CAR, instance, tuple(colour), z, rough=.5), self.part(CAR, instance, tuple(colour * .78), z, rough=.5)
        glass, wheel = self.part(CAR, instance, (.16, .20, .25), z, rough=.2), self.part(CAR, instance, (.06, .06, .06), z)
        if along:
            w, rear = self.uniform(.85, 1.), self.chance(.5)
            lamp = self.part(CAR, instance, (.72, .1, .1) if rear else (.92, .92, .82), z, (1.2, .1, .05) if rear else (2.2, 2.1, 1.7))
            for s in (-1, 1):
                self.box(x + s * w, x + s * (w - .28), 0, .5, z, wheel)
            self.polygon([(x - w * .8, h, z), (x + w * .8, h, z), (x + w, h * .56, z), (x - w, h * .56, z)], shade)
            self.polygon([(x - w * .68, h * .94, z), (x + w * .68, h * .94, z), (x + w * .84, h * .6, z), (x - w * .84, h * .6, z)], glass)
            self.box(x - w, x + w, .22, h * .6, z, body)
            for s in (-1, 1):
                self.box(x + s * w * .97, x + s * w * .58, h * .34, h * .5, z, lamp)
            self.box(x - .28, x + .28, .3, .46, z, self.part(CAR, instance, (.9, .9, .86), z))
        else:
            length, s = self.uniform(1.9, 2.3), -1 if self.chance(.5) else 1
            lamp = self.part(CAR, instance, (.92, .92, .82), z, (2., 1.9, 1.5))
            self.polygon([(x - s * length * .75, h * .6, z), (x - s * length * .45, h, z), (x + s * length * .25, h, z), (x + s * length * .6, h * .6, z)], shade)
            self.polygon([(x - s * length * .63, h * .6, z), (x - s * length * .4, h * .93, z), (x - s * length * .1, h * .93, z), (x - s * length * .1, h * .6, z)], glass)
            self.polygon([(x, h * .6, z), (x, h * .93, z), (x + s * length * .2, h * .93, z), (x + s * length * .48, h * .6, z)], glass)
            self.box(x - length, x + length, .25, h * .62, z, body), self.box(x + s * length * .88, x + s * length, h * .38, h * .53, z, lamp)
            for wx in (-.6, .6):
                self.ellipse(x + wx * length, .36, z, .36, .36, wheel)

    def bus(self, x, z, along):
        instance, colour, h = self.instance(), np.array(self.colour("bus")), self.uniform(2.9, 3.5)
        body, skirt = self.part(BUS, instance, tuple(colour), z, rough=.5), self.part(BUS, instance, tuple(colour * .7), z, rough=.5)
        glass = self.part(BUS, instance, (.18, .21, .26), z, (.5, .5, .36) if self.chance(.6) else (0, 0, 0), .2)
        wheel = self.part(BUS, instance, (.06, .06, .06), z)
        if along:
            lamp = self.part(BUS, instance, (.8, .2, .1), z, (1.2, .2, .1) if self.chance(.5) else (2., 2., 1.6))
            for s in (-1, 1):
                self.box(x + s * 1.3, x + s * .95, 0, .6, z, wheel)
            self.box(x - 1.3, x + 1.3, .35, h, z, body), self.box(x - 1.12, x + 1.12, h * .48, h * .88, z, glass), self.box(x - 1.3, x + 1.3, .35, h * .26, z, skirt)
            for s in (-1, 1):
                self.box(x + s * 1.15, x + s * .8, h * .29, h * .38, z, lamp)
        else:
            length, n = self.uniform(3.6, 4.8), self.random.integers(4, 6)
            self.box(x - length, x + length, .4, h, z, body), self.box(x - length, x + length, .4, h * .3, z, skirt)
            for k in range(n):
                a = x - length + 2 * length * (k + .14) / n
                self.box(a, a + 2 * length * .72 / n, h * .5, h * .85, z, glass)
            for wx in (-.65, .65):
                self.ellipse(x + wx * length, .52, z, .52, .52, wheel)


def lay_out(street, place):
    """Draw one street of the given place, far to near. Numbers are metres; the camera stands somewhere on the road at X = 0."""
    s, uniform, chance, poisson = street, street.uniform, street.chance, street.random.poisson
    half = uniform(5.5, 8.) if place == "avenue" else uniform(3.6, 5.5)
    camera, pavement = uniform(-half * .45, half * .45), uniform(1.8, 3.6)
    left, right = -half - camera, half - camera                            # the kerbs
    green = place == "village" or (place == "avenue" and chance(.6)) or (place == "town" and chance(.3))
    beyond = s.part(VEGETATION if green else SIDEWALK, s.instance(), s.colour("grass" if green else "sidewalk", .03), -1.)
    skyline = s.horizon + s.eye * s.focal / FAR
    s.draw.rectangle([0, skyline, WIDTH * FINE, HEIGHT * FINE], fill=beyond)

    if place in ("city", "town") or chance(.4):                            # the far end of the street: houses or trees
        instance, colour, x = s.instance(), np.array(s.colour("building")), 0.
        while x < WIDTH * FINE:
            w = uniform(20, 60)
            s.draw.rectangle([x, skyline - uniform(6, 36), x + w, skyline], fill=s.part(BUILDING, instance, tuple(colour * uniform(.85, 1.1)), 120.))
            x += w
    else:
        ink, x = s.part(VEGETATION, s.instance(), s.colour("leaf", .03), 120., rough=2.), 0.
        while x < WIDTH * FINE:
            w, h = uniform(24, 50), uniform(8, 26)
            s.draw.ellipse([x - w * .2, skyline - h, x + w, skyline + h], fill=ink)
            x += w * .7
        s.draw.rectangle([0, skyline, WIDTH * FINE, HEIGHT * FINE], fill=beyond)

    stone = s.colour("sidewalk", .03)
    for x0, x1, kerb in ((left - pavement, left, left - .2), (right, right + pavement, right)):
        instance = s.instance()
        s.ground(x0, x1, s.part(SIDEWALK, instance, stone, -1.))
        s.ground(kerb, kerb + .2, s.part(SIDEWALK, instance, tuple(.8 * v for v in stone), -1.))
    road = s.instance()
    s.ground(left, right, s.part(ROAD, road, s.colour("road", .03), -1.))
    paint, z = s.part(ROAD, road, (.86, .86, .83), -1.), uniform(2, 5)
    while z < 45:
        s.ground(-camera - .12, -camera + .12, paint, z, z + 2.2)
        z += 5.5
    if chance(.3):                                                         # a zebra crossing
        z, x = uniform(6, 12), left + .5
        while x < right - .8:
            s.ground(x, x + .6, paint, z, z + 3)
            x += 1.3

    things = []                                                            # (depth, draw): painted far to near
    tall = dict(city=(8, 17), town=(5, 9), village=(3.2, 5), avenue=(6, 13))[place]
    for side in (-1, 1):
        kerb = right if side > 0 else -left
        edge = kerb + pavement
        gap = dict(city=0., town=uniform(0, 1), village=uniform(2, 5), avenue=uniform(1, 4))[place]
        z = uniform(4, 8)
        while z < 70:
            depth = uniform(7, 16)
            if chance(dict(city=.95, town=.85, village=.6, avenue=.8)[place]):
                things.append((z, lambda z=z, d=depth, x=edge + gap, side=side: s.building(side, x, z, z + d, tall, place == "village" or (place == "town" and chance(.5)))))
            else:
                for _ in range(2):
                    things.append((uniform(z, z + depth), lambda z=z, x=side * (edge + uniform(1, 5)): s.tree(x, z + 1)))
            z += depth + (uniform(1, 5) if place in ("village", "avenue") else 0)
        if chance(dict(city=.1, town=.35, village=.75, avenue=.35)[place]):
            near = uniform(4, 10)
            far = near + uniform(10, 30)
            things.append(((near + far) / 2, lambda a=near, b=far, x=edge + uniform(0, .4), side=side: s.fence(side, x, a, b)))
        z = uniform(5, 9)
        while z < 38:                                                      # what stands along the kerb
            x, kind = side * (kerb + uniform(.35, .7)), s.random.random()
            trees = dict(city=.1, town=.25, village=.3, avenue=.55)[place]
            if kind < trees:
                things.append((z, lambda x=side * (kerb + pavement * uniform(.5, .9)), z=z: s.tree(x, z)))
            elif kind < trees + .08:
                things.append((z, lambda x=side * (edge + .3), z=z: s.bush(x, z)))
            elif kind < trees + .3:
                things.append((z, lambda x=x, z=z, side=side: s.lamp(x, z, side)))
            elif kind < trees + .42:
                things.append((z, lambda x=x, z=z: s.traffic_light(x, z)))
            else:
                things.append((z, lambda x=x, z=z: s.traffic_sign(x, z)))
            z += uniform(5, 12)
        for _ in range(poisson(1.1)):
            z = uniform(4.5, 16)
            things.append((z, lambda z=z, x=side * (kerb + pavement * uniform(.15, .9)): s.person(x, z)))
        if half > 4.2 and chance(.5):                                      # parked cars
            z = uniform(7, 14)
            for _ in range(s.random.integers(1, 4)):
                things.append((z, lambda z=z, x=side * (kerb - 1.2): s.car(x, z, True)))
                z += uniform(5, 8)
    for count, near, far, thing in ((poisson(.6), 5, 18, lambda x, z: s.person(x, z)), (poisson(1.3), 7, 28, lambda x, z: s.car(x, z, chance(.65))),
                                    (int(chance(.4)), 9, 24, lambda x, z: s.bus(x, z, chance(.55))), (poisson(1.1), 4.5, 14, lambda x, z: s.bicycle(x, z))):
        for _ in range(count):
            z = uniform(near, far)
            things.append((z, lambda z=z, x=uniform(left + 1.2, right - 1.2), thing=thing: thing(x, z)))
    for _, thing in sorted(things, key=lambda pair: -pair[0]):
        thing()


# ----------------------------------------------------------------------------- light and weather
@lru_cache(1)
def noise_banks():
    """Two tileable 512 x 512 fields of unit variance: clouds and dirt (all scales), and grain (the finest)."""
    random = np.random.default_rng(0)
    clouds = np.zeros((512, 512), np.float32)
    for size, weight in ((4, .3), (8, .3), (16, .3), (32, .25), (64, .2), (128, .15)):
        clouds += weight * zoom(random.standard_normal((size, size)).astype(np.float32), 512 // size, order=1, mode="grid-wrap", grid_mode=True)
    grain = gaussian_filter(random.standard_normal((512, 512)).astype(np.float32), .8, mode="wrap")
    return clouds / clouds.std(), grain / grain.std()


def noise(random, bank):
    y, x = random.integers(512 - HEIGHT), random.integers(512 - WIDTH)
    field = noise_banks()[bank][y:y + HEIGHT, x:x + WIDTH]
    return field[:, ::-1] if random.random() < .5 else field


def mix(a, b, weight):
    weight = weight[..., None] if np.ndim(weight) == 2 else weight
    return a * (1 - weight) + b * weight


def weather(street, style, sunny):
    """The part canvas -> image float (H, W, 3), label (H, W), instance (H, W)."""
    random, uniform = street.random, street.uniform
    parts = np.asarray(street.canvas)
    once = parts[::FINE, ::FINE]
    label = np.array(street.classes, np.uint8)[once]
    instance = np.array(street.instances, np.int32)[once]

    def mean(table):
        return np.array(table, np.float32)[parts].reshape(HEIGHT, FINE, WIDTH, FINE, -1).mean((1, 3))
    colour, light = mean(street.colours), mean(street.lights)
    depth, rough = np.array(street.depths, np.float32)[once], np.array(street.roughness, np.float32)[once][..., None]
    row, column = np.arange(HEIGHT, dtype=np.float32)[:, None], np.arange(WIDTH, dtype=np.float32)[None]
    horizon, vanishing = street.horizon / FINE, street.centre / FINE
    depth = np.where(depth < 0, np.minimum(street.eye * street.focal / FINE / np.maximum(row - horizon, .5), FAR), depth)
    sky, ground = (label == SKY)[..., None], (label == ROAD) | (label == SIDEWALK)
    up = (row / HEIGHT)[..., None]

    if style == "game":
        air = np.array(GAME_SKIES[random.integers(len(GAME_SKIES))]) * (1 - .2 * up) + .15 * up
        return np.where(sky, air, colour) * (1 + random.normal(0, .02)), label, instance

    surface = colour * np.clip(1 + uniform(.5, 1.1) * rough * (.06 * noise(random, 0) + .05 * noise(random, 1))[..., None], .4, 1.7)
    standing = ((label >= PERSON) | (label == POLE)).astype(np.float32)    # a soft shadow where things meet the ground
    contact = gaussian_filter(np.roll(standing, (2, int(random.integers(-3, 4))), (0, 1)), (1.5, 3.))
    surface = surface * np.where(ground, 1 - .5 * np.clip(contact * 1.5, 0, 1), 1)[..., None]
    cloud = noise(random, 0)[..., None]

    if style == "day":
        tint = np.array((.42, .58, .84) if sunny else (.74, .77, .80)) * uniform(.9, 1.08)
        veil = np.clip(.5 + .5 * cloud, 0, 1) * (uniform(.1, .6) if sunny else .3)
        air = (tint * (1 - veil) + .92 * veil) * (1 - .3 * up) + .3 * up * np.array((.9, .88, .84))
        if sunny:                                                          # the shadow of a row of houses over the street
            edge = uniform(0, WIDTH) + uniform(-1.5, 1.5) * (row - horizon)
            shade = ((column < edge) if street.chance(.5) else (column > edge)) & (ground | (label >= PERSON))
            surface = surface * np.where(shade, uniform(.5, .7), 1)[..., None]
        image = np.where(sky, air, surface * (uniform(1.05, 1.35) if sunny else uniform(.8, 1.)) * (1 + random.normal(0, .03, 3)))
        image = mix(image, np.where(sky, image, tint), 1 - np.exp(-depth / uniform(200, 600)))
    elif style == "night":
        glow = sum(w * gaussian_filter(light, (r, r, 0)) for r, w in ((2, .5), (6, 1.2), (16, 3.)))
        beam = np.exp(-((column - vanishing) / uniform(50, 90)) ** 2) * np.exp(-np.abs(row - (horizon + 25)) / 24.) * uniform(.2, .5)
        lit = uniform(.34, .52) * np.array((.80, .88, 1.2) if street.chance(.6) else (1.15, .95, .75)) + 1.1 * glow + beam[..., None] * np.array((1, .95, .8))
        black = np.array((.05, .06, .12)) * uniform(.6, 1.3)
        image = np.where(sky, black + .2 * glow, surface * lit) + .7 * np.minimum(light, 1.4) + .10 * glow
    elif style == "snow":
        cover = np.clip((gaussian_filter(noise(random, 0), 2) - uniform(-1.2, .2)) * 1.5 + .5, 0, 1)
        above = np.roll(instance, 2, 0)
        edge = np.where((above != instance) & (label != SIGN), .9, 0)      # what points up, under open air
        lies = np.select([label == ROAD, label == SIDEWALK, label == VEGETATION, label >= BUILDING],
                         [cover * .8, np.clip(.45 + cover, 0, .95), np.clip(.30 + .25 * noise(random, 1) + .3 * cover, 0, .9), edge], 0.)
        air = np.array((.78, .80, .84)) * uniform(.8, 1.05)
        image = np.where(sky, air, mix(surface * uniform(.75, 1.), np.array((.90, .92, .97)) * uniform(.88, 1.), gaussian_filter(lies, .6)))
        image = mix(image, np.where(sky, image, air), 1 - np.exp(-depth / uniform(50, 150)))
        flakes = np.zeros((HEIGHT, WIDTH), np.float32)
        n = random.integers(40, 160)
        flakes[random.integers(0, HEIGHT, n), random.integers(0, WIDTH, n)] = 1
        image = mix(image, np.array((.97, .97, 1.)), np.clip(gaussian_filter(flakes, uniform(.6, .9)) * 3.5, 0, .9))
    elif style == "fog":
        air = np.array((.74, .76, .78)) * uniform(.7, 1.12) * (1 + random.normal(0, .02, 3))
        image = mix(np.where(sky, air, surface * uniform(.75, 1.)), air, 1 - np.exp(-depth / uniform(10, 30)))
    elif style == "rain":
        air = np.array((.48, .52, .57)) * uniform(.8, 1.25) + .05 * cloud
        image = np.where(sky, air, surface * uniform(.6, .9) * np.array((.92, .97, 1.06)))
        mirror = np.clip((2 * (horizon + uniform(8, 20)) - np.arange(HEIGHT)).astype(int), 0, HEIGHT - 1)
        wet = np.clip(.4 + .25 * noise(random, 0), .1, .75) * uniform(.6, 1.1)
        image = mix(image, gaussian_filter(image[mirror], (3, 1, 0)), np.where(ground, wet, 0))
        image = image + .25 * gaussian_filter(light, (3, 3, 0)) + .3 * np.minimum(light, 1)
        image = mix(image, np.where(sky, image, air), 1 - np.exp(-depth / uniform(40, 110)))
        streaks = np.zeros((HEIGHT, WIDTH), np.float32)
        n = random.integers(40, 120)
        streaks[random.integers(0, HEIGHT, n), random.integers(0, WIDTH, n)] = 1
        streaks = gaussian_filter(streaks, (uniform(3, 5), .45))
        image = image + (streaks / streaks.max())[..., None] * uniform(.10, .22)
    else:
        raise ValueError(f"style {style!r}: expected one of {', '.join(STYLES)}")
    blur = uniform(0, .7)
    image = gaussian_filter(image, (blur, blur, 0)) if blur > .3 else image
    image = np.clip(image, 0, 1) ** uniform(.85, 1.18)
    return image + random.normal(0, uniform(.004, .016), image.shape), label, instance


# ----------------------------------------------------------------------------- captions
NAMES = {ROAD: ("road", "street"), SIDEWALK: ("sidewalk", "pavement"), BUILDING: ("building", "house"), FENCE: ("fence", "fence"), POLE: ("pole", "lamp post"),
         SIGN: ("traffic sign", "sign"), VEGETATION: ("tree", "tree"), SKY: ("sky", "sky"), PERSON: ("person", "pedestrian"), CAR: ("car", "car"),
         BUS: ("bus", "bus"), BICYCLE: ("bicycle", "bike")}
PLURALS = {"person": "people", "bus": "buses"}
STREETS = dict(city="city street", town="town", village="village", avenue="wide avenue")
AIR = {"game": ["daylight"], "sunny": ["the sun", "bright daylight", "a {place} on a sunny day", "a sunny {place}"],
       "cloudy": ["daylight", "a {place} on a cloudy day", "a cloudy {place}", "a {place} under a grey sky"],
       "night": ["the dark", "a {place} at night", "a dark {place} at night", "the night"],
       "snow": ["the snow", "a snowy {place}", "a {place} in winter", "heavy snow"],
       "fog": ["the fog", "a foggy {place}", "a {place} on a misty morning", "thick fog"],
       "rain": ["the rain", "a rainy {place}", "a wet {place} on a rainy day", "heavy rain"]}
COUNTLESS = (ROAD, SIDEWALK, SKY)


def setting(random):
    """The first two draws of a scene: which place, and whether the sun shines (seen by day only)."""
    return PLACES[random.integers(len(PLACES))], bool(random.random() < .6)


def caption(random, label, instance, style, place, sunny, most=3):
    """'a photo of X in Z': X = up to `most` things that are really there, Z = place and weather. The game says that it is one."""
    words = []
    for cls, names in NAMES.items():
        ids, areas = np.unique(instance[label == cls], return_counts=True)
        n = int((areas >= 60).sum())
        if n == 0:
            continue
        name = names[int(random.random() < .25)]
        plural = PLURALS.get(name, name + "s")
        phrase = f"a {name}" if n == 1 or cls in COUNTLESS else f"two {plural}" if n == 2 else f"many {plural}"
        weight = {ROAD: .25, SIDEWALK: .25, SKY: .25, BUILDING: .4, VEGETATION: .5, POLE: .6}.get(cls, 1.)
        words.append((random.random() / weight, "the sky" if cls == SKY else phrase))
    words = [word for _, word in sorted(words)][:int(random.integers(1, most + 1))] or ["a street"]
    x = words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]
    airs = AIR[style if style != "day" else "sunny" if sunny else "cloudy"]
    z = airs[random.integers(len(airs))].format(place=STREETS[place])
    return f"a {'video game picture' if style == 'game' else 'photo'} of {x} in {z}"


def captions(seed, style, label, instance, n):
    """n other captions of the scene that draw(seed, style) drew."""
    place, sunny = setting(np.random.default_rng(seed))
    return [caption(np.random.default_rng((seed, i)), label, instance, style, place, sunny) for i in range(n)]


def draw(seed, style):
    """One scene. The seed alone decides the street; the style decides the palette and the weather.

    -> image uint8 (128, 256, 3), label uint8 (128, 256) in 0..11, instance uint8 (128, 256), caption str."""
    random = np.random.default_rng(seed)
    place, sunny = setting(random)
    street = Street(random, style)
    lay_out(street, place)
    image, label, instance = weather(street, style, sunny)
    text = caption(random, label, instance, style, place, sunny)
    _, instance = np.unique(instance, return_inverse=True)
    return (np.clip(image, 0, 1) * 255).astype(np.uint8), label, instance.reshape(HEIGHT, WIDTH).astype(np.uint8), text


# ----------------------------------------------------------------------------- data sets
def seeds(split, style, n=None):
    """The n first seeds of a split and style. Every (split, style, image) has a seed of its own."""
    first, count = SPLITS[split]
    return [first + 100_000 * STYLES.index(style) + i for i in range(n or count)]


def _draw(job):
    return draw(*job)


def draw_many(jobs, workers=None):
    """[(seed, style), ...] -> images, labels, instances (N, ...) uint8 and captions, drawn on all cores."""
    with Pool(workers or os.cpu_count()) as pool:
        images, labels, instances, captions = zip(*pool.imap(_draw, jobs, chunksize=16))
    return np.stack(images), np.stack(labels), np.stack(instances), list(captions)


def write_folder(folder, split, style, n=None):
    """A `folder:` data set: images/NAME.png, labels/NAME.png. Written beside its place and renamed, so that it is whole or not there."""
    folder = Path(folder)
    if folder.exists():
        return
    jobs = [(seed, style) for seed in seeds(split, style, n)]
    images, labels, _, _ = draw_many(jobs)
    part = folder.with_name(folder.name + f".part{os.getpid()}")
    for kind, arrays in (("images", images), ("labels", labels)):
        (part / kind).mkdir(parents=True)
        for (seed, _), array in zip(jobs, arrays):
            Image.fromarray(array).save(part / kind / f"{style}_{seed}.png")
    try:
        part.rename(folder)
    except OSError:                     # another stage drew the same folder meanwhile: the pictures are the same
        import shutil
        shutil.rmtree(part)


def write_toy(root):
    """All data sets of the toy preset under root: the labelled source, and a validation and a test split of every style."""
    wanted = [("train", "game")] + [(split, style) for split in ("validation", "test") for style in STYLES]
    for split, style in wanted:
        write_folder(Path(root) / (style if split == "test" else f"{style}_{split}"), split, style)


def contact_sheet(path, columns=4, first=3_500_000):
    palette = np.array([(128, 64, 128), (244, 35, 232), (70, 70, 70), (190, 153, 153), (153, 153, 153), (220, 220, 0), (107, 142, 35),
                        (70, 130, 180), (220, 20, 60), (0, 0, 142), (0, 60, 100), (119, 11, 32)], np.uint8)
    rows = []
    for style in STYLES:
        scenes = [draw(first + 100 * STYLES.index(style) + i, style) for i in range(columns)]
        print(style, "|", scenes[0][3], "|", scenes[-1][3])
        rows.append(np.concatenate([scene[0] for scene in scenes] + [palette[scenes[-1][1]]], 1))
    Image.fromarray(np.concatenate(rows)).save(path)


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] == "--look":
        contact_sheet(sys.argv[2])
    elif len(sys.argv) == 2 and not sys.argv[1].startswith("-"):
        write_toy(sys.argv[1])
    else:
        sys.exit(__doc__)
